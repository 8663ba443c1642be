"""The folders of tests/golden/logits: a tiny model of every family, with logits of transformers' torch classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

GOLDEN_MODELS = Path(__file__).parent / "golden" / "logits"

LIKE_ANOTHER = (
    *("ernie4_5", "gemma3", "mistral3", "olmo3", "phi4_mini", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_vl", "seed_oss", "starcoder2"),
)
"""Families whose mechanisms other folders show; the default suite leaves them out."""


def golden_models(*, short: Iterable[str] | None = None) -> list[Any]:
    """Returns the names of all folders as parameters of a test.

    Args:
      short: the folders that the default suite runs; None for all except those of `LIKE_ANOTHER`.
    """
    names = sorted(path.name for path in GOLDEN_MODELS.iterdir())
    default = set(names) - set(LIKE_ANOTHER) if short is None else set(short)
    return [pytest.param(name, marks=() if name in default else pytest.mark.full) for name in names]
