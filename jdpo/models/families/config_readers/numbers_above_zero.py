"""Reads settings that are numbers above 0."""

from __future__ import annotations

import math
from typing import Any


def above_zero(hf_config: Any, key: str) -> float | None:
    """Reads a cap or a divisor; None if it is not set.

    Raises:
      ValueError: the value is not a number above 0.
    """
    value = getattr(hf_config, key)
    return None if value is None else positive(key, value)


def positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: expected a number above 0, found {value!r}")
    return float(value)
