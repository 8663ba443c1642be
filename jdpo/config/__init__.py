"""The settings of a run: their keys, how they are read, and which of them may change when a run is resumed."""

from jdpo.config.addresses import public_text, refuse_passwords, without_queries
from jdpo.config.constructors import explain_faults_of
from jdpo.config.explaining import command_of, keys_of
from jdpo.config.groups import (
    DataSettings,
    LoggingSettings,
    MemorySettings,
    ModelSettings,
    OptimizationSettings,
    OutputSettings,
    PreferenceSettings,
    ReferenceSettings,
    SampleSettings,
)
from jdpo.config.keys import CONFIGS, DPOConfig, SFTConfig, TrainConfig
from jdpo.config.nested import (
    LORA_DEFAULTS,
    RULE_DEFAULTS,
    DatasetConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    WatchdogConfig,
)
from jdpo.config.reading import (
    defaults_of,
    load_config,
    parse_overrides,
    to_dict,
    to_public_dict,
    to_public_yaml,
    to_yaml,
)
from jdpo.config.resuming import EXPORT_KEYS, FREE_KEYS, changed_keys, differences
from jdpo.config.value_types import Settings
from jdpo.config.yaml_text import load_yaml

# The classes that Python code constructs.
for _cls in (*CONFIGS.values(), DatasetConfig, LoraConfig, MeshConfig, OptimizerConfig, WatchdogConfig):
    explain_faults_of(_cls)

__all__ = [
    "CONFIGS",
    "EXPORT_KEYS",
    "FREE_KEYS",
    "LORA_DEFAULTS",
    "RULE_DEFAULTS",
    "DPOConfig",
    "DataSettings",
    "DatasetConfig",
    "LoggingSettings",
    "LoraConfig",
    "MemorySettings",
    "MeshConfig",
    "ModelSettings",
    "OptimizationSettings",
    "OptimizerConfig",
    "OutputSettings",
    "PreferenceSettings",
    "ReferenceSettings",
    "SFTConfig",
    "SampleSettings",
    "Settings",
    "TrainConfig",
    "WatchdogConfig",
    "changed_keys",
    "command_of",
    "defaults_of",
    "differences",
    "keys_of",
    "load_config",
    "load_yaml",
    "parse_overrides",
    "public_text",
    "refuse_passwords",
    "to_dict",
    "to_public_dict",
    "to_public_yaml",
    "to_yaml",
    "without_queries",
]
