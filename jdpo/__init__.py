"""Direct Preference Optimization in JAX/Flax.

The public API is the names in `jdpo.__all__` and `jdpo.losses.__all__`; docs/api.md describes them. Everything else is
private and may change in any version.

Importing jdpo touches no device and loads nothing heavy: public names are loaded when first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jdpo._version import __version__

if TYPE_CHECKING:
    from jdpo import losses
    from jdpo.config import (
        DatasetConfig,
        DPOConfig,
        LoraConfig,
        MeshConfig,
        OptimizerConfig,
        SFTConfig,
        load_config,
    )
    from jdpo.data.batching.pair_packing import pack, unpack_logps
    from jdpo.generation.asking.token_logps import NextToken, TokenLogps
    from jdpo.generation.loaded_model import LoadedModel
    from jdpo.generation.values import Answer
    from jdpo.inspection.inspecting import Inspection, inspect
    from jdpo.losses import dpo_loss, make_dpo_loss
    from jdpo.models.packed_attention import packed_attention
    from jdpo.quickstart.tiny_llama import random_model
    from jdpo.reports.trackers.tracker import TrackedRun, Tracker
    from jdpo.training.interface.callbacks import Callback, RunView
    from jdpo.training.interface.pair_tokenizing import TokenizedPairs, tokenize_pairs
    from jdpo.training.interface.run_result import RunResult
    from jdpo.training.run import train
    from jdpo.training.saved.opening import load
    from jdpo.types import PackedBatch, PreferenceBatch

_PUBLIC = {
    "Answer": "jdpo.generation.values",
    "Callback": "jdpo.training.interface.callbacks",
    "DPOConfig": "jdpo.config",
    "DatasetConfig": "jdpo.config",
    "Inspection": "jdpo.inspection.inspecting",
    "LoadedModel": "jdpo.generation.loaded_model",
    "LoraConfig": "jdpo.config",
    "MeshConfig": "jdpo.config",
    "NextToken": "jdpo.generation.asking.token_logps",
    "OptimizerConfig": "jdpo.config",
    "PackedBatch": "jdpo.types",
    "PreferenceBatch": "jdpo.types",
    "RunResult": "jdpo.training.interface.run_result",
    "RunView": "jdpo.training.interface.callbacks",
    "SFTConfig": "jdpo.config",
    "TokenLogps": "jdpo.generation.asking.token_logps",
    "TokenizedPairs": "jdpo.training.interface.pair_tokenizing",
    "TrackedRun": "jdpo.reports.trackers.tracker",
    "Tracker": "jdpo.reports.trackers.tracker",
    "dpo_loss": "jdpo.losses",
    "inspect": "jdpo.inspection.inspecting",
    "load": "jdpo.training.saved.opening",
    "load_config": "jdpo.config",
    "make_dpo_loss": "jdpo.losses",
    "pack": "jdpo.data.batching.pair_packing",
    "packed_attention": "jdpo.models.packed_attention",
    "random_model": "jdpo.quickstart.tiny_llama",
    "tokenize_pairs": "jdpo.training.interface.pair_tokenizing",
    "train": "jdpo.training.run",
    "unpack_logps": "jdpo.data.batching.pair_packing",
}

__all__ = [
    "Answer",
    "Callback",
    "DPOConfig",
    "DatasetConfig",
    "Inspection",
    "LoadedModel",
    "LoraConfig",
    "MeshConfig",
    "NextToken",
    "OptimizerConfig",
    "PackedBatch",
    "PreferenceBatch",
    "RunResult",
    "RunView",
    "SFTConfig",
    "TokenLogps",
    "TokenizedPairs",
    "TrackedRun",
    "Tracker",
    "__version__",
    "dpo_loss",
    "inspect",
    "load",
    "load_config",
    "losses",
    "make_dpo_loss",
    "pack",
    "packed_attention",
    "random_model",
    "tokenize_pairs",
    "train",
    "unpack_logps",
]


# Names are imported on first use: `import jdpo` for a config must not take the seconds that importing jax takes.
def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("jdpo.losses")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
