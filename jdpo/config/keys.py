"""The settings of a run: frozen dataclasses. Defaults live here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, WrapValidator, model_validator
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


def _as_optimizer(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_lora(value: Any, union: Any) -> Any:
    """`lora: true` is LoRA with every key at its default; false says that there is none, null says nothing."""
    del union  # which would report an error of each of its members
    if value is None or value is False:
        return value
    return TypeAdapter(LoraConfig).validate_python({} if value is True else value)


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

    path: str = Field(
        description="a JSON, JSONL, CSV, Parquet or Arrow file or a folder of them, here or at a URL; or a hub name"
    )
    split: str = _key("train", "hub split; for files a slice like train[:90%] or train[100:200]")
    name: str | None = _key(None, "hub configuration (subset) name")
    revision: str | None = _key(None, "hub revision: branch, tag or commit")
    label: str | None = _key(None, "its name in metrics; null: the file's stem, or the hub name's last part")
    weight: PositiveFloat | None = _key(
        None, "share of an epoch's rows, against the weights of the other data sets; then all of them need one"
    )
    num_rows: PositiveInt | None = _key(None, "rows of it an epoch; null: all, once")
    column_map: Mapping[str, str] | None = _key(
        None, "jdpo's name of a column (prompt, chosen, rejected, messages, ...): the file's; null: it has jdpo's"
    )
    ranked: Literal["best_vs_worst", "best_vs_random", "all"] = _key(
        "best_vs_worst", "which pairs a row of several ranked answers gives; best_vs_random picks by the row's words"
    )
    min_margin: NonNegativeFloat | None = _key(
        None, "pairs whose scores are closer than this, or contradict the sides, are dropped; null: none is"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class MeshConfig:
    """Devices along each axis of the mesh; -1 on one axis takes all that the others leave."""

    data: Int = _key(1, "replicas of the weights, each with its part of the batch")
    fsdp: Int = _key(-1, "weights and batch are both split along this axis")
    expert: Int = _key(1, "experts are split along this axis, and batch and other weights as along fsdp")
    tensor: Int = _key(1, "heads, mlp and vocabulary are split along this axis")


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class OptimizerConfig:
    """The update rule; a bare string in `optimizer` is its `name`. Weight decay spares norm scales and biases.

    A key that is None has the value that RULE_DEFAULTS gives the rule; a key that the rule does not read is refused.

    Raises:
      ValueError: a value for a key that the rule does not read.
    """

    name: Literal["adamw", "adamw_bf16", "adafactor", "lion", "sgd"] = _key(
        "adamw",
        "adamw (arXiv 1711.05101); adamw_bf16: the same, weights and moments kept in bfloat16, stochastically rounded; "
        "adafactor (1804.04235, its rate not scaled by the weights); lion (2302.06675); sgd",
    )
    b1: Decay | None = _key(
        None, "decay of the first moment; null: 0.9 for adamw, adamw_bf16 and lion, no first moment for adafactor"
    )
    b2: Decay | None = _key(
        None, "decay of the second moment, 0.999 for adamw and adamw_bf16; for lion, of the first, 0.99"
    )
    eps: PositiveFloat | None = _key(
        None,
        "added to the root of the second moment, 1e-8 for adamw and adamw_bf16; for adafactor, to the square of "
        "gradients, 1e-30",
    )
    momentum: Decay | None = _key(None, "decay of the sum of gradients that sgd follows; null: the gradient alone")
    weight_decay: NonNegativeFloat = _key(0.0, "decoupled decay, scaled by the learning rate, whatever the rule")

    @model_validator(mode="after")
    def _refuse_what_is_not_read(self) -> OptimizerConfig:
        read = RULE_DEFAULTS[self.name]
        for key in RULE_KEYS:
            if key not in read and (value := getattr(self, key)) is not None:
                raise ValueError(f"{key} {value} would not be read: {self.name} has {', '.join(read)}; leave it out")
        return self

    @property
    def settings(self) -> dict[str, float | None]:
        """The keys that the rule reads beside weight_decay, each as given, or else with the rule's own value."""
        given = {key: getattr(self, key) for key in RULE_DEFAULTS[self.name]}
        return {key: RULE_DEFAULTS[self.name][key] if value is None else value for key, value in given.items()}


_ADAMW: dict[str, float | None] = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
RULE_DEFAULTS: dict[str, dict[str, float | None]] = {
    "adamw": _ADAMW,
    "adamw_bf16": _ADAMW,
    "adafactor": {"b1": None, "eps": 1e-30},
    "lion": {"b1": 0.9, "b2": 0.99},
    "sgd": {"momentum": None},
}
"""optimizer.name -> the keys that the rule reads, with the value of those that are left open; None: it goes without."""
RULE_KEYS = ("b1", "b2", "eps", "momentum")
"""Keys that some rules read and others do not."""


TargetModules = Annotated[
    Annotated[str, Field(strict=True)] | tuple[Annotated[str, Field(strict=True)], ...],
    Field(union_mode="left_to_right"),
]


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class LoraConfig:
    """Adapters in place of full fine-tuning. Keys have PEFT's meaning where it has them.

    Raises:
      ValueError: a dropout, or a shape for an adapter that has one already.
    """

    r: PositiveInt | None = _key(None, "rank of the adapters; null: 16, or that of `adapter`")
    alpha: PositiveFloat | None = _key(None, "(x A) B counts alpha / r times; null: 32, or that of `adapter`")
    use_rslora: bool | None = _key(
        None, "alpha / sqrt(r) times instead (arXiv 2312.03732); null: false, or as `adapter` says"
    )
    target_modules: TargetModules | None = _key(
        None,
        "all-linear, a regular expression for whole module names, or a list such as [q_proj, v_proj]; "
        "null: all-linear, or those of `adapter`",
    )
    adapter: str | None = _key(
        None,
        "a PEFT adapter folder or hub name to go on from; the reference is then the base with it, as it came, unless "
        "reference_model names the base",
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "int8"] = _key(
        "auto",
        "dtype of the frozen weights; auto: compute_dtype; int8: projections in int8 with a scale a channel, the rest "
        "in compute_dtype",
    )
    merge: bool = _key(False, "export the base with the adapters added to it, and not the adapters alone")
    dropout: NonNegativeFloat = _key(0.0, "none: policy and reference run without dropout, so that they compare")

    @model_validator(mode="after")
    def _refuse_dropout(self) -> LoraConfig:
        if self.dropout:
            raise ValueError(
                f"dropout {self.dropout} is not supported: policy and reference run without dropout, or step 0 would "
                "not be their tie; leave it out"
            )
        return self


LORA_DEFAULTS: dict[str, Any] = {"r": 16, "alpha": 32.0, "use_rslora": False, "target_modules": "all-linear"}
"""Of the keys of `lora` that an adapter may answer, where none does."""

Datasets = Annotated[tuple[Annotated[DatasetConfig, BeforeValidator(_as_dataset)], ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TrainConfig:
    """What every training command shares."""

    model_name_or_path: str = Field(description="a Hugging Face model folder, or a hub name")
    output_dir: str = Field(description="where everything that the run leaves goes")
    datasets: Datasets = Field(description="training rows: one path, or a list of {path, split, name, revision, ...}")
    model_revision: str | None = _key(None, "hub revision of the model")
    eval_datasets: Datasets = _key((), "held-out rows, in the same form as datasets")
    chat_template: str | None = _key(
        None, "a Jinja file, or the built-in chatml, for a model without a format; new tokens are added"
    )
    max_length: PositiveInt = _key(1024, "tokens of prompt plus completion; completions are cut from the right")
    max_prompt_length: PositiveInt | None = _key(None, "longer prompts lose tokens on the left; null: never")
    cache_dir: str | None = _key(None, "tokenized rows are kept here; null: ~/.cache/jdpo")
    dataset_num_proc: PositiveInt | None = _key(
        None, "processes that tokenize; null: one for a few thousand rows, as many as cores for more"
    )
    num_examples: PositiveInt | None = _key(
        None, "rows an epoch where data sets have weights; null: as many as pass over the largest set once"
    )
    eval_fraction: Fraction = _key(
        0.0, "share of the prompts whose rows are held out for evaluation, by hash; in place of eval_datasets"
    )

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = _key(
        "auto",
        "dtype of activations (weights are float32, but under adamw_bf16); "
        "auto: bfloat16 on TPU and GPU, float32 on CPU",
    )
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = _key(
        "auto",
        "what the backward pass computes again: nothing, all but matmuls, all but attention, whole layers, or whole "
        "layers whose inputs wait in the host's memory; auto: the fastest of the first four that fits the device",
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = _key(
        "auto", "attention backend; auto: cudnn on GPU, splash on TPU, blockwise elsewhere, where they fit the model"
    )
    attention_block_q: PositiveInt | None = _key(
        None, "queries a tile of splash (a multiple of 128) or blockwise (of 16) attention; null: by the length"
    )
    attention_block_kv: PositiveInt | None = _key(None, "keys a tile; for blockwise the same as attention_block_q")
    router_aux_loss_coef: NonNegativeFloat | None = _key(
        None, "weight of the router's load balancing loss, of models with experts; null: as their config.json says"
    )
    lora: Annotated[LoraConfig | Literal[False] | None, WrapValidator(_as_lora)] = _key(
        None,
        "train adapters beside frozen weights; true: with every key at its default; false: train all weights; null: "
        "the same, but for a model that is an adapter, which is gone on from",
    )
    mesh: MeshConfig = _key(MeshConfig(), "how the devices are laid out")

    global_batch_size: PositiveInt = _key(32, "rows an optimizer step, whatever the mesh and micro-batches")
    micro_batch_size: PositiveInt | None = _key(
        None, "most rows a device computes at once; null: as many as max_tokens_per_device hold"
    )
    packing: bool = _key(True, "rows back to back without padding, each prompt once; false: padded batches")
    max_tokens_per_device: PositiveInt | None = _key(
        None, "most tokens a device computes at once; null: as many as its memory holds and are of use"
    )
    num_train_epochs: PositiveFloat = _key(1.0, "passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = _key(None, "stop after this many steps, instead of num_train_epochs")
    shuffle: bool = _key(True, "a new order each epoch; false: file order")
    group_by_length: bool = _key(
        False, "rows of similar length share a step: random at the scale of 16 steps, and no longer within them"
    )
    seed: Seed = _key(42, "of the row order, new embedding rows and stochastic rounding")

    learning_rate: PositiveFloat = _key(1e-6, "peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _key("linear", "shape after the warm-up")
    warmup_ratio: Fraction = _key(0.0, "share of the steps spent rising linearly from 0")
    warmup_steps: NonNegativeInt | None = _key(None, "the same in steps; it replaces warmup_ratio")
    max_grad_norm: PositiveFloat | None = _key(1.0, "clip gradients at this global norm; null: do not clip")
    optimizer: Annotated[OptimizerConfig, BeforeValidator(_as_optimizer)] = _key(OptimizerConfig(), "the update rule")
    offload_optimizer: bool = _key(
        False, "keep moments in the host's memory between steps, where the platform can; true costs time"
    )

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
    push_to_hub: str | None = _key(
        None, "upload the exported folder to this model repository of the Hugging Face hub, private; null: nowhere"
    )
    push_public: bool = _key(False, "let push_to_hub make a repository that everyone sees")
    resume: Literal["auto", "never"] = _key(
        "auto", "auto: go on from the newest checkpoint in output_dir; never: refuse a used output_dir"
    )
    profile_steps: str | None = _key(
        None, "FIRST:LAST, such as 10:13: a profiler trace of these steps in output_dir/profile"
    )
    compilation_cache: bool = _key(True, "keep compiled programs in cache_dir, so that the next start is quick")
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


CONFIGS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}
"""The settings of each training command, by its name."""
