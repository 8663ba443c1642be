"""Averages over the steps since the last log, and over the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Window:
    """Mean of per-step values since the last log. It travels with the checkpoint, so that a resumed run logs
    what an uninterrupted one would."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        """
        Args:
          saved: what `to_json` gave, or None for an empty window.
        """
        self._sums: dict[str, float] = dict(saved["sums"]) if saved else {}
        self._steps: int = saved["steps"] if saved else 0

    def add(self, values: Mapping[str, float]) -> None:
        """Takes the values of one step; every step has the same names."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def averages(self) -> dict[str, float]:
        """Mean of each value over the steps taken in; empty when there were none."""
        return {name: total / self._steps for name, total in self._sums.items()}

    def to_json(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "steps": self._steps}


class Throughput:
    """Rows, tokens and seconds of the steps since the last log; evaluation and saving are not in them."""

    def __init__(self) -> None:
        self._steps = self._rows = self._tokens = 0
        self._seconds = 0.0

    def add(self, *, num_rows: int, num_tokens: int, seconds: float) -> None:
        self._steps, self._rows = self._steps + 1, self._rows + num_rows
        self._tokens, self._seconds = self._tokens + num_tokens, self._seconds + seconds

    def rates(self, unit: str) -> dict[str, float]:
        """`<unit>_per_second`, `tokens_per_second`, `step_seconds`."""
        return {
            f"{unit}_per_second": self._rows / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
        }


class RowAverages:
    """Averages over the real rows of several batches, in float64 on the host."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._rows = 0
        self._normalizer = 0.0

    def add(self, rows: Mapping[str, np.ndarray], num_rows: int, normalizer: float) -> None:
        """Takes a batch: values [k, m] of which the first num_rows are real, and the loss's divisor."""
        for name, mean in mean_over_rows(rows, num_rows).items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * num_rows
        self._rows += num_rows
        self._normalizer += normalizer

    def averages(self) -> dict[str, float]:
        """The loss over what it is normalised by (pairs or tokens), everything else over rows."""
        return {
            name: total / (self._normalizer if name == "loss" else self._rows) for name, total in self._sums.items()
        }


def mean_over_rows(rows: Mapping[str, np.ndarray], num_rows: int) -> dict[str, float]:
    """Mean of each [k, m] value over its first num_rows entries; what follows is padding.

    >>> mean_over_rows({"x": np.array([[1.0, 2.0], [6.0, np.nan]])}, 3)
    {'x': 3.0}
    """
    return {name: float(values.reshape(-1)[:num_rows].mean(dtype=np.float64)) for name, values in rows.items()}
