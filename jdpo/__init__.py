"""Direct Preference Optimization in JAX/Flax.

Importing jdpo touches no device and pulls in nothing heavy: public names are loaded when first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jdpo._version import __version__

if TYPE_CHECKING:
    from jdpo import losses
    from jdpo.config import DPOConfig, SFTConfig
    from jdpo.losses import dpo_loss, make_dpo_loss
    from jdpo.training.loop import train
    from jdpo.types import PreferenceBatch

_PUBLIC = {
    "DPOConfig": "jdpo.config",
    "SFTConfig": "jdpo.config",
    "dpo_loss": "jdpo.losses",
    "make_dpo_loss": "jdpo.losses",
    "train": "jdpo.training.loop",
    "PreferenceBatch": "jdpo.types",
}

__all__ = [
    "DPOConfig",
    "PreferenceBatch",
    "SFTConfig",
    "__version__",
    "dpo_loss",
    "losses",
    "make_dpo_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("jdpo.losses")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
