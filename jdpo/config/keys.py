"""The settings of a run: frozen dataclasses. Defaults live here, and those of groups in `jdpo.config.groups`."""

from __future__ import annotations

from typing import Annotated, Literal

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
    output_dir: Text = Field(description="where everything that the run leaves goes")
    datasets: Datasets = Field(description="training rows: one path, or a list of {path, split, name, revision, ...}")
    model_revision: Text | None = key(None, "hub revision of the model")
    eval_datasets: Datasets = key((), "held-out rows, in the same form as datasets")
    chat_template: Text | None = key(
        None, "a Jinja file, or the built-in chatml, for a model without a format; new tokens are added"
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
        None, "rows an epoch where data sets have weights; null: as many as pass over the largest set once"
    )
    eval_fraction: Fraction = key(
        0.0, "share of the prompts whose rows are held out for evaluation, by hash; in place of eval_datasets"
    )

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
        "auto",
        "dtype of activations (weights are float32, but under adamw_bf16); "
        "auto: bfloat16 on TPU and GPU, float32 on CPU",
    )
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = key(
        "auto",
        "what the backward pass computes again: nothing, all but matmuls, all but attention, whole layers, or whole "
        "layers whose inputs wait in the host's memory; auto: the fastest of the first four that fits the device",
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = key(
        "auto", "attention backend; auto: cudnn on GPU, splash on TPU, blockwise elsewhere, where they fit the model"
    )
    attention_block_q: PositiveInt | None = key(
        None, "queries a tile of splash (a multiple of 128) or blockwise (of 16) attention; null: by the length"
    )
    attention_block_kv: PositiveInt | None = key(None, "keys a tile; for blockwise the same as attention_block_q")
    router_aux_loss_coef: NonNegativeFloat | None = key(
        None, "weight of the router's load balancing loss, of models with experts; null: as their config.json says"
    )
    lora: Annotated[LoraConfig | Literal[False] | None, WrapValidator(as_lora)] = key(
        None,
        "train adapters beside frozen weights; true: with every key at its default; false: train all weights; null: "
        "the same, but for a model that is an adapter, which is gone on from",
    )
    mesh: MeshConfig = key(MeshConfig(), "how the devices are laid out")

    global_batch_size: PositiveInt = key(32, "rows an optimizer step, whatever the mesh and micro-batches")
    micro_batch_size: PositiveInt | None = key(
        None, "most rows a device computes at once; null: as many as max_tokens_per_device hold"
    )
    packing: bool = key(True, "rows back to back without padding, each prompt once; false: padded batches")
    max_tokens_per_device: PositiveInt | None = key(
        None, "most tokens a device computes at once; null: as many as its memory holds and are of use"
    )
    num_train_epochs: PositiveFloat = key(1.0, "passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = key(None, "stop after this many steps, instead of num_train_epochs")
    shuffle: bool = key(True, "a new order each epoch; false: file order")
    group_by_length: bool = key(
        False, "rows of similar length share a step: random at the scale of 16 steps, and no longer within them"
    )
    seed: Seed = key(42, "of the row order, new embedding rows and stochastic rounding")

    learning_rate: PositiveFloat = key(1e-6, "peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = key("linear", "shape after the warm-up")
    warmup_ratio: Fraction = key(0.0, "share of the steps spent rising linearly from 0")
    warmup_steps: NonNegativeInt | None = key(None, "the same in steps; it replaces warmup_ratio")
    max_grad_norm: PositiveFloat | None = key(1.0, "clip gradients at this global norm; null: do not clip")
    optimizer: Annotated[OptimizerConfig, BeforeValidator(as_optimizer)] = key(OptimizerConfig(), "the update rule")
    offload_optimizer: bool = key(
        False, "keep moments in the host's memory between steps, where the platform can; true costs time"
    )

    logging_steps: PositiveInt = key(10, "steps between lines in metrics.jsonl")
    eval_steps: PositiveInt | None = key(None, "steps between evaluations; null: only after the last step")
    save_steps: PositiveInt = key(500, "steps between checkpoints; the last step is always saved")
    save_total_limit: PositiveInt = key(2, "newest checkpoints to keep, beside the best one")
    metric_for_best_model: Text = key("eval_loss", "the eval metric that ranks checkpoints")
    load_best_model_at_end: bool = key(False, "export the best checkpoint instead of the last step")
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = key(
        "source", "dtype of the exported weights; source: as in the model that came in"
    )
    max_shard_size: Text = key("5GB", "largest exported weight file")
    push_to_hub: Text | None = key(
        None, "upload the exported folder to this model repository of the Hugging Face hub, private; null: nowhere"
    )
    push_public: bool = key(False, "let push_to_hub make a repository that everyone sees")
    resume: Literal["auto", "never"] = key(
        "auto",
        "auto: continue from the newest whole checkpoint in output_dir; never: refuse an output_dir that holds a run, "
        "except one whose checkpoints are all damaged, which starts again at step 0",
    )
    profile_steps: Text | None = key(
        None, "FIRST:LAST, such as 10:13: a profiler trace of these steps in output_dir/profile"
    )
    compilation_cache: bool = key(True, "keep compiled programs in cache_dir, so that the next start is quick")
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_list)] = key(
        (), "trackers beside metrics.jsonl"
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

    beta: PositiveFloat = key(0.1, "how strongly the policy is held to the reference")
    loss_type: Annotated[tuple[str, ...], BeforeValidator(as_list)] = key(
        ("sigmoid",), "the preference loss, or a list of losses that are added; docs/losses.md has them all"
    )
    loss_weights: Annotated[tuple[NonNegativeFloat, ...] | None, BeforeValidator(as_list)] = key(
        None, "one weight a loss of the list; null: 1 each"
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
    rpo_alpha: NonNegativeFloat | None = key(None, "adds so much of the chosen side's token-mean NLL; null: none")
    bco_delta: FiniteFloat = key(0.0, "mean reward that bco_pair holds rewards against")
    bco_running_delta: bool = key(False, "bco_pair takes the mean reward of all pairs seen so far instead")
    use_weighting: bool = key(False, "WPO: weigh pairs by how likely the policy finds them")
    ld_alpha: Fraction | None = key(
        None, "LD-DPO: weight of tokens past the shorter completion's length; null: as the others"
    )
    reference: Literal["auto", "live", "cached", "none"] = key(
        "auto",
        "where reference log-probs come from: a frozen model in every step, or computed once and kept; "
        "auto: kept where that pays, none where the loss has none",
    )
    reference_model: Text | None = key(None, "the frozen reference; null: the policy's own start")
    reference_revision: Text | None = key(None, "hub revision of reference_model")
    sync_ref_model: bool = key(False, "TR-DPO: move the reference towards the policy now and then")
    ref_model_mixup_alpha: Annotated[Float, Field(gt=0, le=1)] = key(
        0.6, "share of the policy in the moved reference; 1: the policy replaces it"
    )
    ref_model_sync_steps: PositiveInt = key(512, "steps between two moves of the reference")


CONFIGS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}
"""The settings of each training command, by its name."""
