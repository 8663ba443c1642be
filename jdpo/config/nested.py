"""Keys that hold keys of their own: the entries of `datasets`, and the groups `mesh`, `optimizer`, `lora` and
`watchdog`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, WrapValidator, model_validator

from jdpo.config.value_types import (
    Decay,
    Int,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    Text,
    as_list,
    key,
    required,
    settings,
)


@settings
class DatasetConfig(Settings):
    """One source of rows; a bare string in `datasets` is its `path`."""

    path: Text = required(
        "JSON, JSONL, CSV, Parquet or Arrow file, a folder of them, a URL, or a hub name.", example="pairs.jsonl"
    )
    split: Text = key("train", "Split of a hub dataset; for files a slice such as train[:90%] or train[100:200].")
    name: Text | None = key(None, "Configuration (subset) of a hub dataset.", example="en")
    revision: Text | None = key(None, "Hub revision: a branch, tag or commit.", example="main")
    label: Text | None = key(
        None, "Name in metrics; null: the file name without its ending, or the last part of the hub name.", example="hh"
    )
    weight: PositiveFloat | None = key(
        None, "Share of the rows of an epoch, relative to the other weights. If one dataset has a weight, all need one."
    )
    num_rows: PositiveInt | None = key(None, "Rows of this dataset per epoch; null: each row once.", example="5000")
    column_map: Mapping[str, str] | None = key(
        None,
        "Column names: from jdpo's (prompt, chosen, rejected, messages, ...) to the dataset's.",
        example="{chosen: preferred, rejected: other}",
    )
    ranked: Literal["best_vs_worst", "best_vs_random", "all"] = key(
        "best_vs_worst",
        "Pairs to make from several ranked answers; best_vs_random draws the rejected one by a hash of the row.",
    )
    min_margin: NonNegativeFloat | None = key(
        None,
        "Drop pairs whose scores differ by less than this or contradict the order of the sides; null: keep all.",
        example="0.5",
    )


@settings
class MeshConfig(Settings):
    """Devices along each axis of the mesh; -1 on one axis takes all devices that the others leave."""

    data: Int = key(
        1,
        "Devices that each hold a copy of the weights and take a share of the batch. On several slices a multiple of "
        "their number; 1 stands for that number.",
    )
    fsdp: Int = key(-1, "Devices over which both the weights and the batch are sharded.")
    expert: Int = key(1, "Devices over which experts are sharded; the batch and other weights as along fsdp.")
    tensor: Int = key(1, "Devices over which attention heads, MLP and vocabulary are sharded.")
    slices: PositiveInt | None = key(
        None,
        "TPU slices, or nodes of GPUs, that data goes across while the other axes stay within one; null: as the "
        "devices say. For a TPU a number is checked; nodes of GPUs can be taken together with 1.",
        example="2",
    )


@settings
class WatchdogConfig(Settings):
    """Seconds without progress after which a process counts as stuck and exits with code 124, by phase of the run.

    Each step, batch of an evaluation, compiled program and block of rows is progress, and so is every 64 MiB read or
    written while data, weights or checkpoints are. While one process makes progress, the others may wait for it.
    """

    enabled: bool = key(True, "End processes that are stuck; false: never.", example="false")
    step_factor: PositiveFloat = key(10.0, "Deadline of a step, as a multiple of the median of the last 100 steps.")
    step_seconds: PositiveFloat = key(300.0, "Shortest deadline of a step.")
    start_seconds: PositiveFloat = key(
        1800.0, "Deadline for loading libraries, joining the other processes and finding devices."
    )
    compile_seconds: PositiveFloat = key(
        3600.0, "Deadline of compiling one program, and of each of the first three steps."
    )
    evaluation_seconds: PositiveFloat = key(1800.0, "Deadline of one batch of an evaluation.")
    save_seconds: PositiveFloat = key(3600.0, "Deadline of saving, since the last 64 MiB that were written.")
    export_seconds: PositiveFloat = key(
        7200.0, "Deadline of the export, since the last 64 MiB that were written, and of uploading it."
    )
    other_seconds: PositiveFloat = key(
        3600.0, "Deadline of every other phase: data, reference, weights, waiting for a batch, sampled answers."
    )


@settings
class OptimizerConfig(Settings):
    """The optimizer; a bare string in `optimizer` is its `name`. Norm scales, biases, sinks and xIELU do not decay.

    A key that is None takes the value of RULE_DEFAULTS; a key that the optimizer does not use is refused.

    Raises:
      ValueError: a value for a key that the optimizer does not use.
    """

    name: Literal["adamw", "adamw_bf16", "adafactor", "lion", "sgd"] = key(
        "adamw",
        "Optimizer. adamw_bf16 keeps weights and moments in bfloat16 with stochastic rounding; adafactor does not "
        "scale its learning rate by the weights.",
    )
    b1: Decay | None = key(
        None,
        "Decay of the first moment; null: 0.9 for adamw, adamw_bf16 and lion, no first moment for adafactor.",
        example="0.95",
    )
    b2: Decay | None = key(
        None, "Decay of the second moment (lion: of the first); null: 0.999, for lion 0.99.", example="0.98"
    )
    eps: PositiveFloat | None = key(
        None,
        "Added to the root of the second moment (adafactor: to the squared gradients); null: 1e-8, for adafactor "
        "1e-30.",
        example="1e-6",
    )
    momentum: Decay | None = key(None, "Momentum of sgd; null: none.", example="0.9")
    weight_decay: NonNegativeFloat = key(
        0.0, "Decoupled weight decay, multiplied by the learning rate, for every optimizer.", example="0.01"
    )

    @model_validator(mode="after")
    def _refuse_unused_keys(self) -> OptimizerConfig:
        used = RULE_DEFAULTS[self.name]
        for name in RULE_KEYS:
            if name not in used and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} {value} has no effect: {self.name} uses {', '.join(used)} and weight_decay; leave it out"
                )
        return self

    @property
    def settings(self) -> dict[str, float | None]:
        """The keys that the optimizer uses besides weight_decay, those not given at their default."""
        given = {name: getattr(self, name) for name in RULE_DEFAULTS[self.name]}
        return {name: RULE_DEFAULTS[self.name][name] if value is None else value for name, value in given.items()}


_ADAMW: dict[str, float | None] = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
RULE_DEFAULTS: dict[str, dict[str, float | None]] = {
    "adamw": _ADAMW,
    "adamw_bf16": _ADAMW,
    "adafactor": {"b1": None, "eps": 1e-30},
    "lion": {"b1": 0.9, "b2": 0.99},
    "sgd": {"momentum": None},
}
"""optimizer.name -> the keys that the optimizer uses, with their defaults; None: it runs without."""
RULE_KEYS = ("b1", "b2", "eps", "momentum")
"""Keys that some optimizers use and others do not."""

if TYPE_CHECKING:
    from jdpo.config.value_types import Converted

    TargetModules = Converted[str | Sequence[str] | None, str | tuple[str, ...] | None]
else:
    TargetModules = (
        Annotated[
            Annotated[str, Field(strict=True)] | tuple[Annotated[str, Field(strict=True)], ...],
            Field(union_mode="left_to_right"),
        ]
        | None
    )


@settings
class LoraConfig(Settings):
    """Adapters instead of full fine-tuning; keys have PEFT's meaning where PEFT has them.

    Raises:
      ValueError: a dropout other than 0.
    """

    r: PositiveInt | None = key(None, "Rank of the adapters; null: 16, or that of `adapter`.", example="8")
    alpha: PositiveFloat | None = key(
        None, "Scale: the update (x A) B is multiplied by alpha / r; null: 32, or that of `adapter`.", example="16"
    )
    use_rslora: bool | None = key(
        None, "Scale by alpha / sqrt(r) instead (arXiv 2312.03732); null: false, or as in `adapter`."
    )
    target_modules: TargetModules = key(
        None,
        "Modules to adapt: all-linear, a list of names, or a regular expression for whole module names; "
        "null: all-linear, or those of `adapter`.",
        example="[q_proj, v_proj]",
    )
    adapter: Text | None = key(
        None,
        "PEFT adapter (folder or hub name) to continue from. The reference is then the base model with this adapter, "
        "unless reference_model names the base.",
        example="runs/sft/model",
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "int8"] = key(
        "auto",
        "Dtype of the frozen weights. auto: compute_dtype; int8: projections in int8 with one scale per channel, all "
        "other weights in compute_dtype.",
    )
    merge: bool = key(False, "Export the base model with the adapters merged into it, not the adapters alone.")
    dropout: NonNegativeFloat = key(
        0.0, "Must be 0: policy and reference run without dropout, so that their log-probabilities compare."
    )

    @model_validator(mode="after")
    def _refuse_dropout(self) -> LoraConfig:
        if self.dropout:
            raise ValueError(
                f"dropout {self.dropout} is not supported: with it, policy and reference would differ at step 0; leave "
                "it out"
            )
        return self


LORA_DEFAULTS: dict[str, Any] = {"r": 16, "alpha": 32.0, "use_rslora": False, "target_modules": "all-linear"}
"""Defaults of the keys of `lora` that an adapter to continue from determines otherwise."""


def _text_as(key: str) -> BeforeValidator:
    """Reads a bare text as a group of keys of which it is the value of `key`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _as_lora(value: Any, union: Any) -> Any:
    """Reads `true` as LoRA with its defaults, and `false` as full fine-tuning; null leaves the choice to the model."""
    del union  # which would report an error for each of its members
    if value is None or value is False:
        return value
    return TypeAdapter(LoraConfig).validate_python({} if value is True else value)


if TYPE_CHECKING:
    _Dataset = str | DatasetConfig | Mapping[str, Any]
    Datasets = Converted[_Dataset | Sequence[_Dataset], tuple[DatasetConfig, ...]]
    Mesh = Converted[MeshConfig | Mapping[str, int], MeshConfig]
    Watchdog = Converted[WatchdogConfig | Mapping[str, float | bool], WatchdogConfig]
    Optimizer = Converted[OptimizerConfig | str | Mapping[str, Any], OptimizerConfig]
    Lora = Converted[LoraConfig | Mapping[str, Any] | bool | None, LoraConfig | Literal[False] | None]
else:
    Datasets = Annotated[tuple[Annotated[DatasetConfig, _text_as("path")], ...], BeforeValidator(as_list)]
    Mesh = MeshConfig
    Watchdog = WatchdogConfig
    Optimizer = Annotated[OptimizerConfig, _text_as("name")]
    Lora = Annotated[LoraConfig | Literal[False] | None, WrapValidator(_as_lora)]
