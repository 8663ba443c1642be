"""Keys and values of other trainers (TRL, LLaMA-Factory, axolotl, Tunix), and their names in jdpo.

This is plain data for error messages. None of these keys is accepted, since a key that means almost the same is worse
than an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

RENAMED = {
    # model and data
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "chat_template_path": "chat_template",
    "chat_template_jinja": "chat_template",
    "dataset": "datasets",
    "dataset_name": "datasets",
    "dataset_path": "datasets",
    "train_file": "datasets",
    "eval_dataset": "eval_datasets",
    "test_datasets": "eval_datasets",
    "validation_file": "eval_datasets",
    "val_size": "eval_fraction",
    "val_set_size": "eval_fraction",
    "max_samples": "num_examples",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_processes": "dataset_num_proc",
    "dataset_prepared_path": "cache_dir",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "model_max_length": "max_length",
    "shuffle_dataset": "shuffle",
    # the loss
    "pref_beta": "beta",
    "dpo_beta": "beta",
    "rl_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing",
    "pref_ftx": "rpo_alpha",
    "nll_coef": "rpo_alpha",
    "gamma": "simpo_gamma",
    "cpo_simpo_gamma": "simpo_gamma",
    "lambda_orpo": "beta",
    "mixup_alpha": "ref_model_mixup_alpha",
    "ref_model": "reference_model",
    "ref_model_name_or_path": "reference_model",
    # steps and the optimizer
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "total_batch_size": "global_batch_size",
    "per_device_batch_size": "micro_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "clip_grad": "max_grad_norm",
    "data_seed": "seed",
    "optim": "optimizer.name",
    "optimizer_name": "optimizer.name",
    "optimizer_type": "optimizer.name",
    "adafactor": "optimizer.name",
    "momentum": "optimizer.momentum",
    "sgd_momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "cpu_offload": "offload_optimizer",
    "offload_optimizer_state": "offload_optimizer",
    "optimizer_memory_host_offload": "offload_optimizer",
    # adapters
    "peft_config": "lora",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "peft_use_rslora": "lora.use_rslora",
    "lora_model_dir": "lora.adapter",
    "adapter_name_or_path": "lora.adapter",
    # files and steps
    "logging_dir": "output_dir",
    "checkpoint_root_directory": "output_dir",
    "eval_every_n_steps": "eval_steps",
    "hub_model_id": "push_to_hub",
    "project": "run_project",
    "wandb_project": "run_project",
    "mlflow_experiment_name": "run_project",
    "wandb_name": "run_name",
    "mlflow_run_name": "run_name",
    "wandb_group": "run_group",
    "wandb_run_group": "run_group",
    "wandb_tags": "run_tags",
    "lora.lora_alpha": "lora.alpha",
    "lora.rank": "lora.r",
    "optimizer.lr": "learning_rate",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.type": "optimizer.name",
    "datasets.subset": "datasets.name",
    "datasets.columns": "datasets.column_map",
    "datasets.num_samples": "datasets.num_rows",
    "datasets.data_files": "datasets.path",
    "datasets.file_name": "datasets.path",
    "datasets.hf_hub_url": "datasets.path",
}
"""Another trainer's key -> jdpo's, with the same values."""


class Foreign(NamedTuple):
    """The key of jdpo that corresponds to another trainer's key.

    Attributes:
      key: the key of jdpo, or None if it has none.
      values: another trainer's value in lower case -> jdpo's as YAML; None: the key is left out. See also `SAME`.
      note: what else to know.
    """

    key: str | None = None
    values: Mapping[str, str | None] = {}
    note: str = ""


SAME = {"*": "*"}
"""Every value means the same here."""

_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32", "auto": "auto"}
_NO_FP16 = "float16 would need loss scaling; bfloat16 does not"
_ON = "true"
_BATCH = (
    "global_batch_size counts rows per optimizer step over all devices: per_device_train_batch_size x "
    "gradient_accumulation_steps x devices"
)
_OWN_TEMPLATE = "the model's own chat template is used; a model without one takes a file, or the built-in chatml"
_MESH = "devices are laid out by `mesh`; mesh.fsdp shards weights and optimizer state over all devices by default"
_COMMAND = "choose the command instead: `jdpo sft` or `jdpo dpo`"

FOREIGN = {
    # precision
    "bf16": Foreign("compute_dtype", {"true": "bfloat16", "false": "float32", "auto": "auto"}),
    "fp16": Foreign("compute_dtype", {"true": "bfloat16", "false": None}, _NO_FP16),
    "half": Foreign("compute_dtype", {"true": "bfloat16", "false": None}, _NO_FP16),
    "fp32": Foreign("compute_dtype", {"true": "float32", "false": None}),
    "tf32": Foreign(None, {}, "set JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32 in the environment"),
    "dtype": Foreign("compute_dtype", _DTYPES),
    "torch_dtype": Foreign("compute_dtype", _DTYPES),
    "pure_bf16": Foreign("optimizer.name", {"true": "adamw_bf16", "false": None}),
    "load_in_8bit": Foreign("lora.base_dtype", {"true": "int8", "false": None}),
    "load_in_4bit": Foreign(
        "lora.base_dtype", {"true": "int8", "false": None}, "int8 is the smallest; there are no 4-bit weights"
    ),
    "quantization_bit": Foreign("lora.base_dtype", {"8": "int8", "4": "int8"}, "int8 is the smallest"),
    "model_init_kwargs": Foreign(None, {}, "compute_dtype and attention determine how the model is loaded"),
    "ref_model_init_kwargs": Foreign(None, {}, "the reference is loaded as the policy is"),
    "bnb_4bit_quant_type": Foreign(None, {}, "lora.base_dtype: int8 is the smallest; there are no 4-bit weights"),
    "bnb_4bit_compute_dtype": Foreign("compute_dtype", _DTYPES),
    # batches
    "per_device_train_batch_size": Foreign("micro_batch_size", SAME, _BATCH),
    "per_device_eval_batch_size": Foreign(None, {}, "evaluation uses micro_batch_size, or as much as memory holds"),
    "eval_batch_size": Foreign(None, {}, "evaluation uses micro_batch_size, or as much as memory holds"),
    "gradient_accumulation_steps": Foreign(
        "global_batch_size", {}, f"{_BATCH}; how many micro-batches that takes follows from the memory of the devices"
    ),
    "gradient_checkpointing": Foreign("remat", {"true": "full", "false": "none", "unsloth": "full"}),
    "gradient_checkpointing_kwargs": Foreign(None, {}, "`remat` sets what the backward pass recomputes"),
    "sample_packing": Foreign("packing", {"true": _ON, "false": "false"}),
    "padding_free": Foreign("packing", {"true": _ON, "false": "false"}),
    "pad_to_sequence_len": Foreign("packing", {"true": "false", "false": _ON}),
    "neat_packing": Foreign("packing", {"true": _ON, "false": "false"}),
    "max_completion_length": Foreign(None, {}, "max_length is for prompt and completion together"),
    "max_response_length": Foreign(None, {}, "max_length is for prompt and completion together"),
    "max_seq_token_per_tpu": Foreign("max_tokens_per_device", SAME),
    "packing_strategy": Foreign(None, {}, "rows are packed whole, and never split or cut to fill a row of slots"),
    "eval_packing": Foreign("packing", {"true": _ON, "false": "false"}, "for training and evaluation alike"),
    "pad_to_multiple_of": Foreign(None, {}, "the shapes of batches are chosen for the device"),
    "precompute_ref_batch_size": Foreign(None, {}, "max_tokens_per_device holds for the reference too"),
    "auto_find_batch_size": Foreign("max_tokens_per_device", {"true": "null", "false": None}, "null: what fits"),
    "eval_accumulation_steps": Foreign(None, {}, "evaluation keeps a few numbers per row, and no logits"),
    "average_tokens_across_devices": Foreign(None, {}, "the loss is always the mean over the global batch"),
    "activation_offloading": Foreign("remat", {"true": "offload", "false": None}),
    "truncation_mode": Foreign(
        None, {}, "prompts lose tokens on the left beyond max_prompt_length, completions on the right beyond max_length"
    ),
    # adapters
    "use_peft": Foreign("lora", {"true": _ON, "false": "false"}),
    "finetuning_type": Foreign("lora", {"lora": _ON, "full": "false"}),
    "adapter": Foreign("lora", {"lora": _ON, "qlora": _ON}, "for qlora add lora.base_dtype int8"),
    "lora_target_linear": Foreign("lora.target_modules", {"true": "all-linear", "false": None}),
    "lora_modules_to_save": Foreign(None, {}, "only adapters are trained, no whole modules next to them"),
    "lora_task_type": Foreign(None, {}, "nothing here needs it"),
    "lora.bias": Foreign(None, {}, "biases stay frozen under lora"),
    "lora.task_type": Foreign(None, {}, "nothing here needs it"),
    "lora.modules_to_save": Foreign(None, {}, "only adapters are trained, no whole modules next to them"),
    "use_dora": Foreign(None, {}, "jdpo has LoRA and rsLoRA (lora.use_rslora)"),
    # the loss and the reference
    "precompute_ref_log_probs": Foreign("reference", {"true": "cached", "false": "live"}),
    "reference_free": Foreign("loss_type", {"true": "simpo", "false": None}, "or cpo, or orpo"),
    "force_use_ref_model": Foreign(None, {}, "reference_model names a reference; by default it is the policy's start"),
    "disable_dropout": Foreign(None, {}, "training always runs without dropout"),
    "use_liger_kernel": Foreign(None, {}, "the head is always computed in chunks"),
    "use_liger_loss": Foreign(None, {}, "the head is always computed in chunks"),
    "use_unsloth": Foreign(None, {}, "nothing here needs it"),
    "assistant_only_loss": Foreign("loss_on", {"true": "assistant_turns", "false": "completion"}),
    "completion_only_loss": Foreign("loss_on", {"true": "completion"}, "prompts are never learnt"),
    "train_on_inputs": Foreign("loss_on", {"false": "assistant_turns"}, "prompts are never learnt"),
    "train_on_prompt": Foreign("loss_on", {"false": "assistant_turns"}, "prompts are never learnt"),
    "neftune_noise_alpha": Foreign(None, {}, "jdpo adds no noise to embeddings"),
    "algorithm": Foreign("loss_type", {"dpo": "sigmoid", "orpo": "orpo"}),
    "stage": Foreign(None, {}, _COMMAND),
    "rl": Foreign(None, {}, f"{_COMMAND}; for losses such as ipo, simpo and orpo it is `jdpo dpo` with loss_type"),
    "do_train": Foreign(None, {}, "a run always trains; --dry_run checks it without training"),
    "do_eval": Foreign(None, {}, "eval_datasets or eval_fraction turn evaluation on"),
    # text
    "template": Foreign("chat_template", {}, _OWN_TEMPLATE),
    "tokenizer_name_or_path": Foreign(None, {}, "the tokenizer in the model's folder is used"),
    "tokenizer_type": Foreign(None, {}, "the tokenizer in the model's folder is used"),
    "model_type": Foreign(None, {}, "it is in the model's config.json"),
    "eos_token": Foreign(None, {}, "the tokenizer in the model's folder has it, and the chat template writes it"),
    "pad_token": Foreign(None, {}, "padding is masked, so no token is needed for it"),
    "special_tokens": Foreign(None, {}, "the tokenizer in the model's folder has them"),
    "trust_remote_code": Foreign(None, {}, "code of a model folder is never run"),
    "dataset_dir": Foreign(None, {}, "write the folder into the path of each entry of `datasets`"),
    "dataset_config": Foreign("datasets", {}, "as [{path: NAME, name: CONFIG}]"),
    "dataset_train_split": Foreign("datasets", {}, "as [{path: NAME, split: SPLIT}]"),
    "dataset_test_split": Foreign("eval_datasets", {}, "as [{path: NAME, split: SPLIT}]"),
    "datasets.type": Foreign(None, {}, "the columns tell the format; column_map renames them"),
    "datasets.ds_type": Foreign(None, {}, "the file's name tells the format"),
    "datasets.field": Foreign(None, {}, "column_map renames columns"),
    "remove_unused_columns": Foreign(None, {}, "columns that no schema names are ignored"),
    "dataloader_num_workers": Foreign(None, {}, "dataset_num_proc sets how many processes tokenize"),
    "dataset_text_field": Foreign("datasets", {}, "column_map renames columns: [{path: NAME, column_map: {...}}]"),
    "dataset_kwargs": Foreign(None, {}, "the columns tell the format; column_map renames them"),
    "streaming": Foreign(None, {}, "rows are tokenized once and read from disk as needed"),
    # devices
    "attn_implementation": Foreign("attention", {"flash_attention_2": "auto", "sdpa": "auto", "eager": "xla"}),
    "flash_attn": Foreign("attention", {"fa2": "auto", "auto": "auto", "sdpa": "auto", "disabled": "xla"}),
    "flash_attention": Foreign("attention", {"true": "auto", "false": "xla"}),
    "deepspeed": Foreign(None, {}, _MESH),
    "fsdp": Foreign(None, {}, _MESH),
    "fsdp_config": Foreign(None, {}, _MESH),
    "data_sharding_axis": Foreign(None, {}, _MESH),
    "tensor_parallel_size": Foreign("mesh.tensor", SAME),
    "use_cpu": Foreign(None, {}, "set JAX_PLATFORMS=cpu in the environment"),
    **{
        key: Foreign(None, {}, "nothing here needs it")
        for key in (
            "ddp_find_unused_parameters",
            "ddp_timeout",
            "dataloader_drop_last",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "ddp_backend",
            "full_determinism",
            "local_rank",
            "log_level",
            "low_cpu_mem_usage",
            "max_inflight_computations",
            "torch_compile",
            "torch_empty_cache_steps",
            "use_cache",
        )
    },
    # steps, logs and files
    "eval_strategy": Foreign("eval_steps", {"no": None, "epoch": None}, "null evaluates at the end alone"),
    "save_strategy": Foreign("save_steps", {"no": None, "epoch": None}, "the last step is always saved"),
    "logging_strategy": Foreign("logging_steps"),
    "logging_first_step": Foreign(None, {}, "step 1 always has a line of its own"),
    "checkpointing_options": Foreign("save_steps", {}, "save_total_limit sets how many checkpoints are kept"),
    "metrics_logging_options": Foreign("report_to", {}, "metrics.jsonl is always written"),
    "profiler_options": Foreign("profile_steps", {}, "as FIRST:LAST, in steps"),
    "optim_args": Foreign("optimizer", {}, "a group of keys: {name: ..., b1: ..., b2: ...}"),
    "lr_scheduler_kwargs": Foreign("lr_scheduler_type", {}, "the schedules have no further options"),
    "evals_per_epoch": Foreign("eval_steps", {}, "in steps"),
    "saves_per_epoch": Foreign("save_steps", {}, "in steps"),
    "resume_from_checkpoint": Foreign("resume", {}, "a run with the same output_dir resumes by itself"),
    "auto_resume_from_checkpoints": Foreign("resume", {"true": "auto", "false": "never"}),
    "overwrite_output_dir": Foreign(None, {}, "nothing is overwritten: choose another output_dir, or delete this one"),
    "plot_loss": Foreign(None, {}, "plots are drawn in output_dir/plots, unless export_at_end is false"),
    "wandb_entity": Foreign(None, {}, "set WANDB_ENTITY in the environment"),
    "wandb_mode": Foreign(None, {}, "set WANDB_MODE in the environment"),
    "wandb_run_id": Foreign(None, {}, "a resumed run continues under the id that it has"),
    "wandb_watch": Foreign(None, {}, "grad_norm is always logged"),
    "wandb_log_model": Foreign(None, {}, "models are written to output_dir and uploaded with push_to_hub"),
    "mlflow_tracking_uri": Foreign(None, {}, "set MLFLOW_TRACKING_URI in the environment"),
    "trackio_space_id": Foreign(None, {}, "set TRACKIO_SPACE_ID in the environment"),
    "save_safetensors": Foreign(None, {}, "weights are always written as safetensors"),
    "save_only_model": Foreign(None, {}, "checkpoints always hold what a run resumes from"),
    "hub_token": Foreign(None, {}, "`hf auth login` or HF_TOKEN in the environment gives it"),
    "use_wandb": Foreign("report_to", {"true": "wandb", "false": None}),
    "use_mlflow": Foreign("report_to", {"true": "mlflow", "false": None}),
    "use_tensorboard": Foreign("report_to", {"true": "tensorboard", "false": None}),
    "hub_private_repo": Foreign("push_public", {"true": "false", "false": _ON}),
    "greater_is_better": Foreign(None, {}, "a metric whose name ends in loss is better when lower, others when higher"),
    "generate_during_eval": Foreign(None, {}, "export the model and sample from it"),
}
"""Another trainer's key -> how to write it in jdpo, if more than the name differs."""

VALUES = {
    "optimizer.name": {
        "adam": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_8bit": "adamw_bf16",
        "adamw_bnb_8bit": "adamw_bf16",
        "paged_adamw_8bit": "adamw_bf16",
        "paged_adamw_32bit": "adamw",
        "lion_32bit": "lion",
        "lion_8bit": "lion",
    },
    "lora.target_modules": {"all": "all-linear"},
    "lr_scheduler_type": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "compute_dtype": {"bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16", "float16": "bfloat16"},
    "attention": {"flash_attention_2": "auto", "flash_attention_3": "auto", "sdpa": "auto", "eager": "xla"},
    "report_to": {"none": "[]", "all": "tensorboard"},
    "max_steps": {"-1": "null"},
    "remat": {"true": "full", "false": "none"},
    "resume": {"true": "auto", "false": "never"},
    "reference": {"true": "cached", "false": "none"},
    "push_to_hub": {"true": "owner/name"},
}
"""Key of jdpo -> value that other trainers use for it, in lower case -> value in jdpo."""

OTHER_COMMANDS = {
    "rows": "inspect",
    "ids": "inspect",
    "html": "inspect",
    "json": "inspect",
    "strict": "inspect",
    "task": "inspect",
    "on": "plan",
    "lengths": "plan",
    "num_rows": "plan",
    "no_tokenize": "plan",
    "prices": "plan",
    "step": "export",
    "merge": "export",
    "public": "export",
    "prompts": "generate",
    "top_p": "generate",
    "top_k": "generate",
    "max_new_tokens": "generate",
    "num_prompts": "generate",
    "answers_per_shard": "generate",
    "strategy": "pair",
    "max_length_gap": "pair",
    "max_per_prompt": "pair",
    "dedupe": "pair",
    "allow_cut_off": "pair",
    "countries": "quickstart",
    "frequencies": "quickstart",
    "hidden_size": "quickstart",
    "num_layers": "quickstart",
    "pretrain_steps": "quickstart",
    "probes": "quickstart",
    "dry_run": "dpo` and `jdpo sft",
    "print_config": "dpo` and `jdpo sft",
}
"""Options that are not keys of a config -> the command that has them."""
