"""Writes docs/coming_from.md: the keys of other trainers and what to write in jdpo, from the tables of jdpo.config.

python scripts/write_coming_from.py    # after a key or a table in jdpo/config/foreign_keys.py was changed

`jdpo dpo` itself explains the same keys when it meets one, from the same tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jdpo.config import DPOConfig, SFTConfig
from jdpo.config.explaining import keys_of
from jdpo.config.foreign_keys import FOREIGN, RENAMED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming_from.md"


def words(text: str) -> list[str]:
    """Returns the words of a text."""
    return text.split()


TRL = words(
    "learning_rate lr_scheduler_type warmup_steps warmup_ratio max_steps num_train_epochs max_grad_norm seed data_seed "
    "optim weight_decay adam_beta1 adam_beta2 adam_epsilon per_device_train_batch_size gradient_accumulation_steps "
    "per_device_eval_batch_size gradient_checkpointing activation_offloading bf16 fp16 max_length max_prompt_length "
    "max_completion_length truncation_mode padding_free pad_to_multiple_of dataset_num_proc shuffle_dataset beta "
    "loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha discopop_tau "
    "use_weighting rpo_alpha reference_free precompute_ref_log_probs precompute_ref_batch_size sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps disable_dropout router_aux_loss_coef model_init_kwargs "
    "trust_remote_code chat_template_path pad_token eos_token packing packing_strategy eval_packing "
    "completion_only_loss assistant_only_loss dataset_text_field dataset_kwargs use_peft lora_r lora_alpha "
    "lora_dropout lora_target_modules use_rslora use_dora load_in_8bit load_in_4bit output_dir logging_steps "
    "logging_first_step eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit "
    "load_best_model_at_end metric_for_best_model "
    "greater_is_better report_to run_name project trackio_space_id "
    "resume_from_checkpoint overwrite_output_dir push_to_hub hub_model_id "
    "hub_private_repo deepspeed fsdp"
)
"""Keys of TRL's DPOConfig and SFTConfig (1.16), the common ones of their base class, and of its scripts."""

LLAMA_FACTORY = words(
    "stage do_train finetuning_type dataset dataset_dir template cutoff_len max_samples preprocessing_num_workers "
    "val_size pref_beta pref_loss pref_ftx dpo_label_smoothing ref_model lora_rank lora_target adapter_name_or_path "
    "quantization_bit flash_attn neat_packing pure_bf16 plot_loss"
)

AXOLOTL = words(
    "base_model rl rl_beta datasets.type datasets.ds_type datasets.field dataset_prepared_path val_set_size "
    "sequence_len sample_packing pad_to_sequence_len adapter lora_target_linear lora_modules_to_save "
    "flash_attention gradient_clipping evals_per_epoch saves_per_epoch auto_resume_from_checkpoints wandb_project "
    "wandb_name wandb_entity wandb_mode mlflow_tracking_uri mlflow_experiment_name use_tensorboard special_tokens "
    "train_on_inputs"
)

TUNIX = words(
    "algorithm beta lambda_orpo label_smoothing max_prompt_length max_response_length eval_every_n_steps max_steps "
    "gradient_accumulation_steps checkpoint_root_directory checkpointing_options metrics_logging_options "
    "profiler_options data_sharding_axis max_inflight_computations max_seq_token_per_tpu"
)
"""Fields of Tunix's DPOTrainingConfig (0.1)."""

INTRODUCTION = """\
# Coming from TRL, LLaMA-Factory, axolotl or Tunix

After reading this page you can take a config and a dataset of another trainer to jdpo.

**Data.** The rows need no change: TRL's explicit and implicit prompts, conversational and plain text, LLaMA-Factory's
`conversations` with `chosen` and `rejected`, and many others are read as they are ([Data](data.md)). Run
`jdpo inspect` on them first: it shows every token that is learnt, which is where trainers differ most.

**Models.** A Hugging Face folder or hub name in, a Hugging Face folder out; transformers, vLLM and PEFT load it
([Models](models.md), [LoRA](lora.md)).

**Settings.** Most keys have TRL's names. `jdpo dpo` refuses a key that it does not know, and says which of its own to
write: the tables below are what it knows. A batch size counts all devices: `global_batch_size` is rows per optimizer
step, and micro-batches follow from the memory of the devices.

**Numbers.** [Losses](losses.md#where-jdpo-differs-from-trl-116) lists where a loss or a metric differs from TRL's.
Log-probs of a pair are sums over the completion's tokens, its end token included, as in TRL.
"""

TRL_TEXT = """\
| in TRL | in jdpo |
| --- | --- |
| `trl dpo --config run.yaml` | `jdpo dpo run.yaml` |
| `DPOTrainer(model, args=DPOConfig(...), train_dataset=rows).train()` | `jdpo.train(config, train_dataset=rows)` |
| `trainer.save_model()` | a run exports its model when it ends; `jdpo export` does it from any checkpoint |
| `accelerate launch ...` | nothing: one process uses all devices of its host ([several hosts](clusters.md)) |

A key that keeps its name and meaning says *the same*:
"""

TUNIX_TEXT = """\
Tunix trains `flax.nnx` models that you build in Python; jdpo reads the model folder itself, so there is no model code
to write. Three things differ in what is learnt. jdpo takes the tokens that the model's chat template writes, with one
BOS at the start of the conversation and the end of the turn in every completion. Its masks come from lengths, so that
a padding token with the id of a real one hides nothing. A prompt that is too long loses its beginning, not its end. To
train a model of your own code, use [the loss alone](jax.md).

| in Tunix | in jdpo |
| --- | --- |
| `DPOTrainer(model, ref_model, optimizer, config).train(rows, eval_rows)` | `jdpo.train(config, train_dataset=rows)` |
| `TrainingInput(prompts, chosen_responses, rejected_responses)` | rows with `prompt`, `chosen` and `rejected` |
| an optax optimizer with its schedule | `optimizer`, `learning_rate`, `lr_scheduler_type`, `warmup_ratio` |
| `qwix.apply_lora_to_model` | `lora: {r: 16}` |
| a mesh and sharding rules of the model | `mesh: {fsdp: -1}` |
"""


def page() -> str:
    """Returns the text of docs/coming_from.md."""
    parts = [
        INTRODUCTION,
        "## TRL\n",
        TRL_TEXT,
        table(TRL),
        "## LLaMA-Factory\n",
        table(LLAMA_FACTORY),
        "## axolotl\n",
        table(AXOLOTL),
        "## Tunix\n",
        TUNIX_TEXT,
        table(TUNIX),
    ]
    return "\n".join(parts).rstrip() + "\n"


def table(keys: Sequence[str]) -> str:
    """Returns the rows of a table for keys of another trainer.

    Raises:
      ValueError: a key is in none of jdpo's tables.
    """
    return "\n".join(["| key | in jdpo | |", "| --- | --- | --- |", *map(_row, keys), ""])


def _row(key: str) -> str:
    own = {**keys_of(DPOConfig), **keys_of(SFTConfig)}
    if key in own:
        return f"| `{key}` | the same | |"
    if key in RENAMED:
        return f"| `{key}` | `{RENAMED[key]}` | |"
    if key not in FOREIGN:
        raise ValueError(f"{key} is in no table of jdpo/config/foreign_keys.py, so `jdpo dpo` could not explain it")
    entry = FOREIGN[key]
    values = ", ".join(
        f"{theirs}: {'left out' if ours is None else f'`{ours}`'}"
        for theirs, ours in entry.values.items()
        if theirs != "*" and theirs != ours
    )
    note = "; ".join(part for part in (values, entry.note) if part)
    return f"| `{key}` | {f'`{entry.key}`' if entry.key else 'none'} | {note + ' ' if note else ''}|"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
