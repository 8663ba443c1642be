"""Groups of settings that have a name of their own in a run's config, and what keys are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

# A folder may be called 2024: YAML reads a number, the path stays text.
STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _no_bool(value: Any) -> Any:
    """Keep `beta: true` from becoming 1.0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _not_blank(value: str) -> str:
    """Refuses what a variable of the shell that is not set leaves: a path of nothing is the current folder."""
    if not value.strip():
        raise PydanticCustomError("blank_text", "a text is expected, and it is empty")
    return value


def as_list(value: Any) -> Any:
    """Let one entry stand for a list of one."""
    return [value] if isinstance(value, str | Mapping | int | float) else value


def _as_dataset(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def as_optimizer(value: Any) -> Any:
    """Let the name of a rule stand for a group with that name."""
    return {"name": value} if isinstance(value, str) else value


def as_lora(value: Any, union: Any) -> Any:
    """`lora: true` is LoRA with every key at its default; false says that there is none, null says nothing."""
    del union  # which would report an error of each of its members
    if value is None or value is False:
        return value
    return TypeAdapter(LoraConfig).validate_python({} if value is True else value)


Text = Annotated[str, AfterValidator(_not_blank)]
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


def key(default: Any, description: str) -> Any:
    """A key with its default; the description is what --help says of it."""
    return Field(default=default, description=description)


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class DatasetConfig:
    """Where rows come from. A bare string in `datasets` is the `path`."""

    path: Text = Field(
        description="a JSON, JSONL, CSV, Parquet or Arrow file or a folder of them, here or at a URL; or a hub name"
    )
    split: Text = key("train", "hub split; for files a slice like train[:90%] or train[100:200]")
    name: Text | None = key(None, "hub configuration (subset) name")
    revision: Text | None = key(None, "hub revision: branch, tag or commit")
    label: Text | None = key(None, "its name in metrics; null: the file's stem, or the hub name's last part")
    weight: PositiveFloat | None = key(
        None, "share of an epoch's rows, relative to the weights of the other datasets, which then all need one"
    )
    num_rows: PositiveInt | None = key(None, "rows per epoch from this dataset; null: all, once")
    column_map: Mapping[str, str] | None = key(
        None, "jdpo's column names (prompt, chosen, rejected, messages, ...), each with the file's name for it"
    )
    ranked: Literal["best_vs_worst", "best_vs_random", "all"] = key(
        "best_vs_worst", "which pairs are made of several ranked answers; best_vs_random picks by a hash of the row"
    )
    min_margin: NonNegativeFloat | None = key(
        None, "pairs whose scores are closer than this, or contradict the sides, are dropped; null: none"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class MeshConfig:
    """Devices along each axis of the mesh; -1 on one axis takes all that the others leave."""

    data: Int = key(1, "replicas of the weights, each with its share of the batch")
    fsdp: Int = key(-1, "weights and batch are both split along this axis")
    expert: Int = key(1, "experts are split along this axis; batch and other weights as along fsdp")
    tensor: Int = key(1, "heads, mlp and vocabulary are split along this axis")


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class OptimizerConfig:
    """The update rule; a bare string in `optimizer` is its `name`. Weight decay spares norm scales and biases.

    A key that is None has the value that RULE_DEFAULTS gives the rule; a key that the rule does not read is refused.

    Raises:
      ValueError: a value for a key that the rule does not read.
    """

    name: Literal["adamw", "adamw_bf16", "adafactor", "lion", "sgd"] = key(
        "adamw",
        "adamw (arXiv 1711.05101); adamw_bf16: the same, weights and moments kept in bfloat16, stochastically rounded; "
        "adafactor (1804.04235, its rate not scaled by the weights); lion (2302.06675); sgd",
    )
    b1: Decay | None = key(
        None, "decay of the first moment; null: 0.9 for adamw, adamw_bf16 and lion, no first moment for adafactor"
    )
    b2: Decay | None = key(
        None, "decay of the second moment, 0.999 for adamw and adamw_bf16; for lion, of the first, 0.99"
    )
    eps: PositiveFloat | None = key(
        None,
        "added to the root of the second moment, 1e-8 for adamw and adamw_bf16; for adafactor, to the square of "
        "gradients, 1e-30",
    )
    momentum: Decay | None = key(None, "decay of the sum of gradients that sgd follows; null: the gradient alone")
    weight_decay: NonNegativeFloat = key(0.0, "decoupled decay, scaled by the learning rate, whatever the rule")

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


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class LoraConfig:
    """Adapters in place of full fine-tuning. Keys have PEFT's meaning where it has them.

    Raises:
      ValueError: a dropout, or a shape for an adapter that has one already.
    """

    r: PositiveInt | None = key(None, "rank of the adapters; null: 16, or that of `adapter`")
    alpha: PositiveFloat | None = key(None, "scale: (x A) B is multiplied by alpha / r; null: 32, or that of `adapter`")
    use_rslora: bool | None = key(
        None, "scale by alpha / sqrt(r) instead (arXiv 2312.03732); null: false, or as in `adapter`"
    )
    target_modules: TargetModules | None = key(
        None,
        "all-linear, a regular expression for whole module names, or a list such as [q_proj, v_proj]; "
        "null: all-linear, or those of `adapter`",
    )
    adapter: Text | None = key(
        None,
        "a PEFT adapter folder or hub name to continue from; the reference is then the base with that adapter, unless "
        "reference_model names the base",
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "int8"] = key(
        "auto",
        "dtype of the frozen weights; auto: compute_dtype; int8: projections in int8 with a scale a channel, the rest "
        "in compute_dtype",
    )
    merge: bool = key(False, "export the base with the adapters added, instead of the adapters alone")
    dropout: NonNegativeFloat = key(0.0, "none: policy and reference run without dropout, so that they compare")

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

Datasets = Annotated[tuple[Annotated[DatasetConfig, BeforeValidator(_as_dataset)], ...], BeforeValidator(as_list)]
