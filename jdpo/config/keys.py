"""The settings of a run: frozen dataclasses. Defaults live here, and those of groups in `jdpo.config.groups`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WrapValidator
from pydantic.dataclasses import dataclass

from jdpo.config.groups import (
    STRICT_KEYS,
    Datasets,
    FiniteFloat,
    Float,
    Fraction,
    LoraConfig,
    MeshConfig,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    Text,
    as_list,
    as_lora,
    as_optimizer,
    key,
)


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class TrainConfig:
    """What every training command shares."""

    model_name_or_path: Text = Field(description="a Hugging Face model folder, or a hub name")
    output_dir: Text = Field(description="folder for everything that the run writes")
    datasets: Datasets = Field(description="training rows: one path, or a list of {path, split, name, revision, ...}")
    model_revision: Text | None = key(None, "hub revision of the model")
    eval_datasets: Datasets = key((), "held-out rows, in the same form as datasets")
    chat_template: Text | None = key(
        None, "a Jinja file, or the built-in chatml, for a model without a format; new tokens are added"
    )
    chat_template_kwargs: dict[str, Any] | None = key(
        None, "variables for the chat template, such as {enable_thinking: false}; a row's own override them"
    )
    init_untrained_tokens: bool = key(
        False,
        "start tokens of the model that the training rows hold and whose embedding was never trained (zero, or below "
        "1 % of the median norm) at the mean of the trained rows; tokens that chat_template adds always start there",
    )
    max_length: PositiveInt = key(1024, "tokens of prompt plus completion; completions are cut from the right")
    max_prompt_length: PositiveInt | None = key(None, "longer prompts lose tokens on the left; null: never")
    cache_dir: Text | None = key(None, "tokenized rows are kept here; null: ~/.cache/jdpo")
    dataset_num_proc: PositiveInt | None = key(
        None, "processes that tokenize; null: one for a few thousand rows, as many as cores for more"
    )
    num_examples: PositiveInt | None = key(
        None, "rows per epoch when datasets are weighted; null: enough to pass over the largest one once"
    )
    eval_fraction: Fraction = key(
        0.0, "share of the prompts held out for evaluation, chosen by hash; instead of eval_datasets"
    )

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
        "auto",
        "dtype of activations (weights are float32, except under adamw_bf16); "
        "auto: bfloat16 on TPU and GPU, float32 on CPU",
    )
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = key(
        "auto",
        "what the backward pass recomputes: nothing, all except matmuls, all except attention, whole layers, or whole "
        "layers with their inputs kept in host memory; auto: the fastest of the first four that fits the device",
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = key(
        "auto", "attention backend; auto: cudnn on GPU, splash on TPU, blockwise elsewhere, if it can run the model"
    )
    attention_block_q: PositiveInt | None = key(
        None, "queries per tile of splash (a multiple of 128) or blockwise (of 16) attention; null: by the length"
    )
    attention_block_kv: PositiveInt | None = key(None, "keys per tile; for blockwise the same as attention_block_q")
    router_aux_loss_coef: NonNegativeFloat | None = key(
        None, "weight of the router's load balancing loss in models with experts; null: that of config.json"
    )
    lora: Annotated[LoraConfig | Literal[False] | None, WrapValidator(as_lora)] = key(
        None,
        "train adapters next to frozen weights; true: with every key at its default; false: full fine-tuning; null: "
        "full fine-tuning, unless model_name_or_path is a PEFT adapter, from which training then continues",
    )
    mesh: MeshConfig = key(MeshConfig(), "how the devices are laid out")

    global_batch_size: PositiveInt = key(32, "rows per optimizer step, whatever the mesh and micro-batches")
    micro_batch_size: PositiveInt | None = key(
        None, "maximum rows per device at once; null: as many as fit into max_tokens_per_device"
    )
    packing: bool = key(True, "rows back to back without padding, each prompt once; false: padded batches")
    max_tokens_per_device: PositiveInt | None = key(
        None, "maximum tokens per device at once; null: as many as memory holds and speed gains from"
    )
    num_train_epochs: PositiveFloat = key(1.0, "passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = key(None, "stop after this many steps, instead of num_train_epochs")
    shuffle: bool = key(True, "a new order each epoch; false: file order")
    group_by_length: bool = key(
        False, "rows of similar length share a step; the order is then random across groups of 16 steps only"
    )
    seed: Seed = key(42, "seed of the row order, new embedding rows and stochastic rounding")

    learning_rate: PositiveFloat = key(1e-6, "peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = key("linear", "learning rate after the warm-up")
    warmup_ratio: Fraction = key(0.0, "share of the steps spent rising linearly from 0")
    warmup_steps: NonNegativeInt | None = key(None, "steps of the warm-up; replaces warmup_ratio")
    max_grad_norm: PositiveFloat | None = key(1.0, "clip gradients at this global norm; null: do not clip")
    optimizer: Annotated[OptimizerConfig, BeforeValidator(as_optimizer)] = key(OptimizerConfig(), "the update rule")
    offload_optimizer: bool = key(False, "keep moments in host memory between steps, if the platform can; costs time")

    logging_steps: PositiveInt = key(10, "steps between lines in metrics.jsonl")
    eval_steps: PositiveInt | None = key(None, "steps between evaluations; null: only after the last step")
    save_steps: PositiveInt = key(500, "steps between checkpoints; the last step is always saved")
    save_total_limit: PositiveInt = key(2, "newest checkpoints to keep, in addition to the best one")
    metric_for_best_model: Text = key("eval_loss", "the eval metric that ranks checkpoints")
    load_best_model_at_end: bool = key(False, "export the best checkpoint instead of the last step")
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = key(
        "source", "dtype of the exported weights; source: that of the model that training started from"
    )
    max_shard_size: Text = key("5GB", "largest exported weight file")
    push_to_hub: Text | None = key(
        None, "upload the exported folder to this model repository of the Hugging Face hub, private; null: nowhere"
    )
    push_public: bool = key(False, "make the repository of push_to_hub public")
    resume: Literal["auto", "never"] = key(
        "auto",
        "auto: continue from the newest whole checkpoint in output_dir; never: refuse an output_dir that holds a run, "
        "except one whose checkpoints are all damaged, which starts again at step 0",
    )
    heartbeat_timeout_seconds: Annotated[Float, Field(ge=5, le=86400)] = key(
        30.0,
        "seconds without a heartbeat after which a process of the run is taken for dead; then all others end with 75",
    )
    profile_steps: Text | None = key(
        None, "FIRST:LAST, such as 10:13: a profiler trace of these steps in output_dir/profile"
    )
    compilation_cache: bool = key(True, "keep compiled programs in cache_dir, so that the next start is quick")
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_list)] = key(
        (), "trackers in addition to metrics.jsonl"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class SFTConfig(TrainConfig):
    """Settings of `jdpo sft`."""

    learning_rate: PositiveFloat = key(2e-5, "peak learning rate")
    loss_on: Literal["completion", "assistant_turns"] = key(
        "completion", "turns that are learnt: the last assistant turn, or every one that is not marked as shown only"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class DPOConfig(TrainConfig):
    """Settings of `jdpo dpo`."""

    loss_on: Literal["completion", "assistant_turns"] = key(
        "completion",
        "turns that are learnt: the last assistant turn of each side, or every one after the turns that sides share",
    )
    beta: PositiveFloat = key(0.1, "how strongly the policy is held to the reference")
    loss_type: Annotated[tuple[str, ...], BeforeValidator(as_list)] = key(
        ("sigmoid",), "the preference loss, or a list of losses that are added; docs/losses.md has them all"
    )
    loss_weights: Annotated[tuple[NonNegativeFloat, ...] | None, BeforeValidator(as_list)] = key(
        None, "one weight per loss of the list; null: 1 each"
    )
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = key(0.0, "share of preferences taken as flipped")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = key(
        "reverse_kl", "divergence that holds the policy to the reference"
    )
    f_alpha_divergence_coef: FiniteFloat = key(0.5, "alpha of alpha_divergence")
    discopop_tau: PositiveFloat = key(0.05, "temperature of discopop")
    simpo_gamma: FiniteFloat = key(0.5, "target margin of simpo")
    cpo_alpha: NonNegativeFloat = key(1.0, "weight of the likelihood term of cpo")
    orpo_lambda: NonNegativeFloat = key(0.1, "weight of the odds-ratio term of orpo")
    rpo_alpha: NonNegativeFloat | None = key(None, "adds this much of the chosen side's NLL per token; null: none")
    bco_delta: FiniteFloat = key(0.0, "mean reward that bco_pair compares rewards with")
    bco_running_delta: bool = key(False, "bco_pair takes the mean reward of all pairs seen so far instead")
    use_weighting: bool = key(False, "WPO: weigh pairs by how likely the policy finds them")
    ld_alpha: Fraction | None = key(None, "LD-DPO: weight of tokens past the shorter completion's length; null: 1")
    reference: Literal["auto", "live", "cached", "none"] = key(
        "auto",
        "where reference log-probs come from: live: a frozen model in every step; cached: computed once and kept; "
        "auto: cached if that saves time, none if the loss has no reference",
    )
    reference_model: Text | None = key(None, "the frozen reference; null: the policy's own start")
    reference_revision: Text | None = key(None, "hub revision of reference_model")
    sync_ref_model: bool = key(False, "TR-DPO: move the reference towards the policy every ref_model_sync_steps")
    ref_model_mixup_alpha: Annotated[Float, Field(gt=0, le=1)] = key(
        0.6, "share of the policy in the moved reference; 1: the policy replaces it"
    )
    ref_model_sync_steps: PositiveInt = key(512, "steps between two moves of the reference")


CONFIGS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}
"""The settings of each training command, by its name."""
