"""The settings of each training command: the groups that it reads, side by side."""

from __future__ import annotations

from jdpo.config.groups import (
    DataSettings,
    LoggingSettings,
    LossSumSettings,
    MemorySettings,
    ModelSettings,
    OptimizationSettings,
    OutputSettings,
    PreferenceSettings,
    ReferenceSettings,
    SampleSettings,
)
from jdpo.config.value_types import PositiveFloat, key, settings
from jdpo.loss_specs import LossOptions

# Python orders the fields of a dataclass from its last base to its first, so bases are listed from Output to Model.
# DPOConfig names the bases of PreferenceSettings again, since they would otherwise come before the model.


@settings
class TrainConfig(
    OutputSettings,
    SampleSettings,
    LoggingSettings,
    MemorySettings,
    OptimizationSettings,
    DataSettings,
    ModelSettings,
):
    """The settings that every training command has."""


@settings
class SFTConfig(TrainConfig):
    """The settings of `jdpo sft`; keys may be given as in YAML, such as `datasets="rows.jsonl"` or `lora=True`."""

    learning_rate: PositiveFloat = key(2e-5, "Peak learning rate.", example="1e-5")


@settings
class DPOConfig(
    TrainConfig, ReferenceSettings, PreferenceSettings, LossOptions, LossSumSettings, DataSettings, ModelSettings
):
    """The settings of `jdpo dpo`; keys may be given as in YAML, such as `datasets="pairs.jsonl"` or `lora={"r": 8}`."""


CONFIGS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}
"""The settings of each training command, by its name."""
