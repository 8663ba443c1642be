"""Averages over the steps since the last log, and over the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdpo.data.prepared.prepare import PreparedData
from jdpo.training.fit.flops import StepFlops

Shares = Mapping[str, tuple[float, float]]
"""For a metric of some rows: the sum over them, and what it is divided by."""

SHARED = ("loss", "rewards/accuracies", "rewards/margins")
"""Metrics that are logged per dataset, where there are several."""


class DatasetShares:
    """Metrics per dataset, where there are several: `rewards/margins/<label>`, for the datasets in a step."""

    def __init__(self, data: PreparedData) -> None:
        """
        Args:
          data: the rows that steps are made of.
        """
        self._names = data.names if len(data.names) > 1 else ()
        self._dataset_of = data.dataset_of
        sizes = data.sizes() if self._names else None
        # A supervised row's loss is a sum over its learnt tokens, and the run's loss the mean over all of them.
        self._tokens = sizes.scored if sizes is not None and sizes.num_sides == 1 else None

    def of(self, rows: Mapping[str, np.ndarray], indices: np.ndarray) -> dict[str, tuple[float, float]]:
        """Returns the shares of the values [b] of the rows `indices` [b]."""
        shares = {}
        dataset_of = self._dataset_of[indices]
        for number, label in enumerate(self._names):
            mine = dataset_of == number
            if not mine.any():
                continue
            for name in SHARED:
                if name in rows:
                    tokens = self._tokens if name == "loss" else None
                    weight = mine.sum() if tokens is None else tokens[indices[mine]].sum()
                    shares[f"{name}/{label}"] = float(rows[name][mine].sum(dtype=np.float64)), float(weight)
        return shares


class _ShareSums:
    """Sums of shares over several batches."""

    def __init__(self, sums: Mapping[str, Sequence[float]]) -> None:
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in sums.items()}

    def add(self, shares: Shares) -> None:
        for name, pair in shares.items():
            self.sums[name] = [before + new for before, new in zip(self.sums.get(name, (0.0, 0.0)), pair, strict=True)]

    def averages(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.sums.items()}


class Window:
    """Mean of per-step values since the last log.

    It is saved in checkpoints, so that a resumed run logs what an uninterrupted one would.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        """
        Args:
          saved: from `to_json`, or None for an empty window.
        """
        # Sums rather than means are saved: added to further, they give bitwise the result of an uninterrupted run.
        self._sums: dict[str, float] = dict(saved["sums"]) if saved else {}
        self._steps: int = saved["steps"] if saved else 0
        self._shares = _ShareSums(saved.get("shares", {}) if saved else {})

    def add(self, values: Mapping[str, float], shares: Shares | None = None) -> None:
        """Adds one step.

        Args:
          values: averaged over the steps; every step has the same names.
          shares: averaged over their rows; a step has those of the datasets that it has rows of.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._shares.add(shares or {})

    def averages(self) -> dict[str, float]:
        """Returns the mean of each value over the steps, and of each share over its rows; empty without steps."""
        return {name: total / self._steps for name, total in self._sums.items()} | self._shares.averages()

    def to_json(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "steps": self._steps, "shares": self._shares.sums}


class Throughput:
    """Rows, tokens, FLOPs and seconds of the steps since the last log, without evaluation and saving."""

    def __init__(self, *, unit: str, num_devices: int, peak: float | None) -> None:
        """
        Args:
          unit: what a row is called.
          num_devices: devices that share the work.
          peak: FLOP/s of one of them, None if unknown.
        """
        self._unit, self._num_devices, self._peak = unit, num_devices, peak
        self.clear()

    def clear(self) -> None:
        """Starts again from zero."""
        self._steps = self._rows = self._tokens = 0
        self._seconds = self._logical = self._executed = 0.0

    def add(self, *, num_rows: int, num_tokens: int, flops: StepFlops, seconds: float) -> None:
        """Adds one step."""
        self._steps, self._rows = self._steps + 1, self._rows + num_rows
        self._tokens, self._seconds = self._tokens + num_tokens, self._seconds + seconds
        self._logical, self._executed = self._logical + flops.logical, self._executed + flops.executed

    def rates(self) -> dict[str, float]:
        """Returns the rates of the steps since `clear`.

        These are `<unit>_per_second`, `tokens_per_second` (without padding), `step_seconds`, `model_tflops_per_second`
        per device, and with a known peak `mfu` and `mfu_executed`. MFU is the share of the peak that the mathematics
        needs; mfu_executed also counts padding and recomputation.
        """
        per_device = self._seconds * self._num_devices  # device-seconds
        rates = {
            f"{self._unit}_per_second": self._rows / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "model_tflops_per_second": self._logical / per_device / 1e12,
        }
        if self._peak is not None:
            rates["mfu"] = self._logical / per_device / self._peak
            rates["mfu_executed"] = self._executed / per_device / self._peak
        return rates


class RowAverages:
    """Averages over the real rows of several batches, in float64 on the host."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._rows = 0
        self._normalizer = 0.0
        self._shares = _ShareSums({})

    def add(self, rows: Mapping[str, np.ndarray], normalizer: float, shares: Shares | None = None) -> None:
        """Adds a batch: per-row values [b] from `rows_at`, the loss's divisor, and the shares of `DatasetShares`."""
        self._shares.add(shares or {})
        for name, values in rows.items():
            # In float64: a float32 sum over many rows loses digits.
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
        self._rows += len(next(iter(rows.values())))
        self._normalizer += normalizer

    def averages(self) -> dict[str, float]:
        """Returns the loss over its normalizer (pairs or tokens), and everything else over rows."""
        return {
            name: total / (self._normalizer if name == "loss" else self._rows) for name, total in self._sums.items()
        } | self._shares.averages()


def rows_at(rows: Mapping[str, Any], at: np.ndarray) -> dict[str, np.ndarray]:
    """Selects the values [b] of real rows from a report's [k, m]; the others are padding.

    >>> rows_at({"x": np.array([[1.0, np.nan], [2.0, 6.0]])}, np.array([3, 0]))
    {'x': array([6., 1.])}
    """
    return {name: values.reshape(-1)[at] for name, values in rows.items()}


def mean_over_rows(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the mean of each value [b]."""
    return {name: float(values.mean(dtype=np.float64)) for name, values in rows.items()}
