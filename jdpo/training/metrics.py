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

    def add(self, rows: Mapping[str, np.ndarray], normalizer: float) -> None:
        """Takes a batch: per-row values [b] from `rows_at`, and the loss's divisor."""
        for name, values in rows.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
        self._rows += len(next(iter(rows.values())))
        self._normalizer += normalizer

    def averages(self) -> dict[str, float]:
        """The loss over what it is normalised by (pairs or tokens), everything else over rows."""
        return {
            name: total / (self._normalizer if name == "loss" else self._rows) for name, total in self._sums.items()
        }


def rows_at(rows: Mapping[str, np.ndarray], at: np.ndarray) -> dict[str, np.ndarray]:
    """The values [b] of real rows out of a report's [k, m]; the others are padding.

    >>> rows_at({"x": np.array([[1.0, np.nan], [2.0, 6.0]])}, np.array([3, 0]))
    {'x': array([6., 1.])}
    """
    return {name: values.reshape(-1)[at] for name, values in rows.items()}


def mean_over_rows(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of each [b] value."""
    return {name: float(values.mean(dtype=np.float64)) for name, values in rows.items()}
