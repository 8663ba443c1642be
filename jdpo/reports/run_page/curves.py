"""The curves of a run: where each value belongs, smoothed, and with few enough points for a page.

A training line of metrics.jsonl after step b is a mean over the steps a + 1 to b since the line before. The first of
these steps computes its loss with the weights after a updates, the last with those after b - 1. So the mean belongs to
(a + b - 1) / 2 updates: the line of step 1 alone to 0, the weights that training starts from. An evaluation after step
b belongs to b updates, so both kinds of curves have one axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_BUCKETS = 220
"""A long curve is cut into so many parts, of each of which its lowest and its highest value are drawn."""

FEW_POINTS = 24
"""Shorter curves are drawn as they are, and not smoothed."""

SMOOTHED_OVER = 0.05
"""The share of a curve that a smoothed value is the mean of."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values over updates, in the order of the updates.

    Attributes:
      x: float64 [n], updates made before; see above.
      y: float64 [n], all finite.
      steps: float64 [n], the step that the value is logged under.
    """

    x: np.ndarray
    y: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def is_training(line: Mapping[str, Any]) -> bool:
    """Returns True for a line about steps; the others are about evaluations."""
    return not any(key.startswith("eval_") for key in line)


class RunCurves:
    """All curves of a run, by the name of their metric; `eval_` in front of it: on the held-out rows.

    Attributes:
      num_not_finite: values that are NaN or infinite, which are left out.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        # Lines with the same keys make the rows of one matrix, which is far faster than value by value.
        alike: dict[tuple[str, ...], list[int]] = {}
        places = np.empty(len(lines))
        before = 0
        for number, line in enumerate(lines):
            alike.setdefault(tuple(line), []).append(number)
            step = places[number] = line["step"]
            if is_training(line):
                # In a file that was put together by hand, a step may come twice.
                places[number], before = (min(before, step - 1) + step - 1) / 2, step
        parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for names, numbers in alike.items():
            columns = np.array([list(lines[number].values()) for number in numbers], np.float64).T
            steps = columns[names.index("step")]
            for name, column in zip(names, columns, strict=True):
                if name not in ("step", "epoch"):
                    parts.setdefault(name, []).append((places[numbers], column, steps))
        self.num_not_finite = 0
        self._curves: dict[str, Curve] = {}
        for name, of_name in parts.items():
            x, y, steps = (np.concatenate(arrays) for arrays in zip(*of_name, strict=True))
            finite = np.isfinite(y)
            self.num_not_finite += int((~finite).sum())
            order = np.argsort(x[finite], kind="stable")
            if len(order):
                self._curves[name] = Curve(*(array[finite][order] for array in (x, y, steps)))

    def __contains__(self, name: str) -> bool:
        return name in self._curves

    def __getitem__(self, name: str) -> Curve:
        return self._curves[name]

    def names(self) -> list[str]:
        """Returns the names of all curves, in the order in which they first occur."""
        return list(self._curves)


def smoothing_width(num_points: int) -> int:
    """Returns over how many points `smoothed` takes a mean; 1 for a curve that is too short for it."""
    return 1 if num_points < FEW_POINTS else 2 * max(1, round(num_points * SMOOTHED_OVER / 2)) + 1


def smoothed(curve: Curve) -> Curve:
    """Returns the means over as many points before as after each point, so that no peak moves.

    At the start fewer points are taken, on both sides, so that the first value is that of the curve itself. At the end
    there are fewer after a point than before it: the noise of the last value alone would look like a turn.
    """
    half = smoothing_width(len(curve)) // 2
    places = np.arange(len(curve))
    before = np.minimum(half, places)
    after = np.minimum(before, len(curve) - 1 - places)
    sums = np.concatenate([[0.0], np.cumsum(curve.y)])
    means = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    return dataclasses.replace(curve, y=means)


def thinned(curve: Curve, buckets: int = MOST_BUCKETS) -> Curve:
    """Returns at most 2 points of each of `buckets` equal parts of the range: the lowest and the highest.

    The first and the last point stay. No peak is lost, however short it is.
    """
    if len(curve) <= 2 * buckets:
        return curve
    low, high = curve.x[0], curve.x[-1]
    bucket = np.minimum((curve.x - low) / (high - low) * buckets, buckets - 1).astype(np.int64)
    # By part, and within each by value: the first and the last of each part are its extremes.
    order = np.lexsort((curve.y, bucket))
    starts = np.flatnonzero(np.diff(bucket[order], prepend=-1))
    ends = np.append(starts[1:], len(order)) - 1
    kept = np.unique(np.concatenate([[0, len(curve) - 1], order[starts], order[ends]]))
    return Curve(curve.x[kept], curve.y[kept], curve.steps[kept])


def nearest(curve: Curve, x: float) -> int:
    """Returns the place of the point that is nearest to x."""
    place = int(np.searchsorted(curve.x, x))
    if place == 0 or (place < len(curve) and curve.x[place] - x < x - curve.x[place - 1]):
        return place
    return place - 1
