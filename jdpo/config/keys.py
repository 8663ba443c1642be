"""The settings of a run: frozen dataclasses. Defaults live here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

# A folder may be called 2024: YAML reads a number, the path stays text.
_STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _no_bool(value: Any) -> Any:
    """Keep `beta: true` from becoming 1.0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _as_list(value: Any) -> Any:
    """Let one entry stand for a list of one."""
    return [value] if isinstance(value, str | Mapping | int | float) else value


def _as_dataset(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
NonNegativeFloat = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[Float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]


def _key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DatasetConfig:
    """Where rows come from. A bare string in `datasets` is the `path`."""

    path: str = Field(description="a JSON, JSONL or Parquet file, a folder of them, or a hub name")
    split: str = _key("train", "hub split; for files a slice like train[:90%] or train[100:200]")
    name: str | None = _key(None, "hub configuration (subset) name")
    revision: str | None = _key(None, "hub revision: branch, tag or commit")


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class MeshConfig:
    """Devices along each axis of the mesh; -1 on one axis takes all that the others leave."""

    data: Int = _key(1, "replicas of the weights, each with its part of the batch")
    fsdp: Int = _key(-1, "weights and batch are both split along this axis")
    tensor: Int = _key(1, "heads, mlp and vocabulary are split along this axis")


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class OptimizerConfig:
    """The update rule. Weight decay is not applied to norm scales and biases."""

    name: Literal["adamw"] = _key("adamw", "AdamW, arXiv 1711.05101")
    b1: Decay = _key(0.9, "decay of the first moment")
    b2: Decay = _key(0.999, "decay of the second moment")
    eps: PositiveFloat = _key(1e-8, "added to the root of the second moment")
    weight_decay: NonNegativeFloat = _key(0.0, "decoupled decay, scaled by the learning rate")


Datasets = Annotated[tuple[Annotated[DatasetConfig, BeforeValidator(_as_dataset)], ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TrainConfig:
    """What every training command shares."""

    model_name_or_path: str = Field(description="a Hugging Face model folder, or a hub name")
    output_dir: str = Field(description="where everything that the run leaves goes")
    datasets: Datasets = Field(description="training rows: one path, or a list of {path, split, name, revision}")
    model_revision: str | None = _key(None, "hub revision of the model")
    eval_datasets: Datasets = _key((), "held-out rows, in the same form as datasets")
    chat_template: str | None = _key(
        None, "a Jinja file, or the built-in chatml, for a model without a format; new tokens are added"
    )
    max_length: PositiveInt = _key(1024, "tokens of prompt plus completion; completions are cut from the right")
    max_prompt_length: PositiveInt | None = _key(None, "longer prompts lose tokens on the left; null: never")
    cache_dir: str | None = _key(None, "tokenized rows are kept here; null: ~/.cache/jdpo")

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = _key(
        "auto", "dtype of activations over float32 weights; auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    remat: Literal["none", "dots", "full"] = _key(
        "full", "what the backward pass recomputes: nothing, all but matmuls, or whole layers"
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = _key(
        "auto", "attention backend; auto: cudnn on GPU, splash on TPU, blockwise elsewhere, where they fit the model"
    )
    mesh: MeshConfig = _key(MeshConfig(), "how the devices are laid out")

    global_batch_size: PositiveInt = _key(32, "rows an optimizer step, whatever the mesh and micro-batches")
    micro_batch_size: PositiveInt | None = _key(
        None, "most rows a device computes at once; null: as many as max_tokens_per_device hold"
    )
    packing: bool = _key(True, "rows back to back without padding, each prompt once; false: padded batches")
    max_tokens_per_device: PositiveInt | None = _key(None, "most tokens a device computes at once; null: 16384")
    num_train_epochs: PositiveFloat = _key(1.0, "passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = _key(None, "stop after this many steps, instead of num_train_epochs")
    shuffle: bool = _key(True, "a new order each epoch; false: file order")
    seed: Seed = _key(42, "of the row order, and of new embedding rows")

    learning_rate: PositiveFloat = _key(1e-6, "peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _key("linear", "shape after the warm-up")
    warmup_ratio: Fraction = _key(0.0, "share of the steps spent rising linearly from 0")
    warmup_steps: NonNegativeInt | None = _key(None, "the same in steps; it replaces warmup_ratio")
    max_grad_norm: PositiveFloat | None = _key(1.0, "clip gradients at this global norm; null: do not clip")
    optimizer: OptimizerConfig = _key(OptimizerConfig(), "the update rule")

    logging_steps: PositiveInt = _key(10, "steps between lines in metrics.jsonl")
    eval_steps: PositiveInt | None = _key(None, "steps between evaluations; null: only after the last step")
    save_steps: PositiveInt = _key(500, "steps between checkpoints; the last step is always saved")
    save_total_limit: PositiveInt = _key(2, "newest checkpoints to keep, beside the best one")
    metric_for_best_model: str = _key("eval_loss", "the eval metric that ranks checkpoints")
    load_best_model_at_end: bool = _key(False, "export the best checkpoint instead of the last step")
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = _key(
        "source", "dtype of the exported weights; source: as in the model that came in"
    )
    max_shard_size: str = _key("5GB", "largest exported weight file")
    resume: Literal["auto", "never"] = _key(
        "auto", "auto: go on from the newest checkpoint in output_dir; never: refuse a used output_dir"
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_list)] = _key(
        (), "trackers beside metrics.jsonl"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class SFTConfig(TrainConfig):
    """Settings of `jdpo sft`."""

    learning_rate: PositiveFloat = _key(2e-5, "peak learning rate")
    loss_on: Literal["completion", "assistant_turns"] = _key(
        "completion", "tokens that are learnt: the last assistant turn, or all of them"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DPOConfig(TrainConfig):
    """Settings of `jdpo dpo`."""

    beta: PositiveFloat = _key(0.1, "how strongly the policy is held to the reference")
    loss_type: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = _key(
        ("sigmoid",), "the preference loss, or a list of losses that are added; docs/losses.md has them all"
    )
    loss_weights: Annotated[tuple[NonNegativeFloat, ...] | None, BeforeValidator(_as_list)] = _key(
        None, "one weight a loss of the list; null: 1 each"
    )
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = _key(0.0, "share of preferences taken as flipped")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _key(
        "reverse_kl", "divergence that holds the policy to the reference"
    )
    f_alpha_divergence_coef: FiniteFloat = _key(0.5, "alpha of alpha_divergence")
    discopop_tau: PositiveFloat = _key(0.05, "temperature of discopop")
    simpo_gamma: FiniteFloat = _key(0.5, "target margin of simpo")
    cpo_alpha: NonNegativeFloat = _key(1.0, "weight of the likelihood term of cpo")
    orpo_lambda: NonNegativeFloat = _key(0.1, "weight of the odds-ratio term of orpo")
    rpo_alpha: NonNegativeFloat | None = _key(None, "adds so much of the chosen side's token-mean NLL; null: none")
    bco_delta: FiniteFloat = _key(0.0, "mean reward that bco_pair holds rewards against")
    bco_running_delta: bool = _key(False, "bco_pair takes the mean reward of all pairs seen so far instead")
    use_weighting: bool = _key(False, "WPO: weigh pairs by how likely the policy finds them")
    ld_alpha: Fraction | None = _key(
        None, "LD-DPO: weight of tokens past the shorter completion's length; null: as the others"
    )
    reference: Literal["auto", "live", "cached", "none"] = _key(
        "auto",
        "where reference log-probs come from: a frozen model in every step, or computed once and kept; "
        "auto: kept where that pays, none where the loss has none",
    )
    reference_model: str | None = _key(None, "the frozen reference; null: the policy's own start")
    reference_revision: str | None = _key(None, "hub revision of reference_model")
    sync_ref_model: bool = _key(False, "TR-DPO: move the reference towards the policy now and then")
    ref_model_mixup_alpha: Annotated[Float, Field(gt=0, le=1)] = _key(
        0.6, "share of the policy in the moved reference; 1: the policy replaces it"
    )
    ref_model_sync_steps: PositiveInt = _key(512, "steps between two moves of the reference")
