"""The values of one metric over the steps of a run, and what they show in spite of noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from jdpo.reports.share_tests import wilson

Lines = Sequence[Mapping[str, Any]]
"""The objects of a metrics.jsonl."""

FEW_POINTS = 8
"""Fewer lines than this show no trend: with four in each half, the scatter within a half is only just an estimate."""

SURE = 3.0
"""Standard errors from which a change counts as one. Several metrics are tested per run, and lines are not quite
independent of each other, so the usual 2 would be wrong in too many runs."""


class Point(NamedTuple):
    """A value of a metric.

    Attributes:
      step: the last step that it covers.
      num_steps: the steps that it is a mean of; 1 for an evaluation.
    """

    step: int
    value: float
    num_steps: int = 1


class Mean(NamedTuple):
    """The mean of some points.

    Attributes:
      error: standard error, from the scatter of the points; infinite for a single point.
      first, last: the steps that it covers.
      num_steps: how many of them.
    """

    value: float
    error: float
    first: int
    last: int
    num_steps: int

    @property
    def where(self) -> str:
        """The steps in words, with their preposition."""
        return f"at step {self.last:,}" if self.first == self.last else f"in steps {self.first:,} to {self.last:,}"

    @property
    def middle(self) -> int:
        """The step in the middle."""
        return (self.first + self.last) // 2


@dataclasses.dataclass(frozen=True, eq=False)
class Points(Sequence[Point]):
    """The values of a metric in the order of their lines, as columns; see `Point`.

    Attributes:
      steps, num_steps: int [n].
      values: float [n], all finite.
    """

    steps: np.ndarray
    values: np.ndarray
    num_steps: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Points: ...
    def __getitem__(self, index: int | slice) -> Point | Points:
        if isinstance(index, slice):
            return self.at(index)
        return Point(int(self.steps[index]), float(self.values[index]), int(self.num_steps[index]))

    def at(self, index: slice | np.ndarray) -> Points:
        """Returns some of the points: those of a slice, or of int or bool indices."""
        return Points(self.steps[index], self.values[index], self.num_steps[index])

    def after(self, step: int) -> Points:
        """Returns the points after a step."""
        return self.at(self.steps > step)

    def over(self, divisor: float) -> Points:
        """Returns the same points with their values divided."""
        return dataclasses.replace(self, values=self.values / divisor)


class RunMetrics:
    """The metrics of a run. Each is read from the lines once, as there may be 100,000 of them."""

    def __init__(self, lines: Lines, *, has_reference: bool) -> None:
        """Takes the lines of a metrics.jsonl.

        Args:
          has_reference: leave out the evaluation before the first step, in which every pair is a tie.
        """
        self._lines = [line for line in lines if line["step"] > 0] if has_reference else lines
        self._steps = _steps(self._lines)
        # Only training lines have the learning rate; the others are evaluations.
        self._training_lines = [line for line in self._lines if "learning_rate" in line]
        self._training_steps = _steps(self._training_lines)
        self._read: dict[tuple[str, str], Points] = {}

    def training(self, name: str) -> Points:
        """Returns a metric of the training lines; each is a mean over the steps since the training line before."""
        if (found := self._read.get(("training", name))) is None:
            steps = self._training_steps
            num_steps = np.maximum(np.diff(steps, prepend=0), 1)
            found = self._read["training", name] = _finite(self._training_lines, name, steps, num_steps)
        return found

    def held_out(self, name: str) -> Points:
        """Returns a metric of the evaluations."""
        if (found := self._read.get(("held-out", name))) is None:
            num_steps = np.ones_like(self._steps)
            found = self._read["held-out", name] = _finite(self._lines, f"eval_{name}", self._steps, num_steps)
        return found


def _steps(lines: Lines) -> np.ndarray:
    return np.array([line["step"] for line in lines], np.int64)


def _finite(lines: Lines, key: str, steps: np.ndarray, num_steps: np.ndarray) -> Points:
    values = np.array([line.get(key) for line in lines], np.float64)  # None, a line without the key, becomes NaN
    return Points(steps, values, num_steps).at(np.isfinite(values))


def mean_of(points: Points) -> Mean:
    """Returns the mean of at least one point, weighted by steps."""
    steps = int(points.num_steps.sum())
    error = math.inf
    with np.errstate(over="ignore"):  # the square of a value above 1e154 is infinite, and so is its scatter
        value = float((points.values * points.num_steps).sum()) / steps
        if len(points) > 1:
            variance = float((points.num_steps * np.square(points.values - value)).sum()) / steps
            error = math.sqrt(variance / (len(points) - 1))
    return Mean(value, error, points[0].step - points[0].num_steps + 1, points[-1].step, steps)


def last_quarter(points: Points) -> Mean | None:
    """Returns the mean over the last quarter of the points, rounded up; None without points."""
    return mean_of(points[-math.ceil(len(points) / 4) :]) if points else None


def has_changed(before: Mean, after: Mean, *, by: float = 0.0) -> int:
    """Returns 1 or -1 if a mean has risen or fallen by more than `by` and by more than noise, else 0."""
    change = after.value - before.value
    error = math.hypot(before.error, after.error)
    # A difference that rounding explains is none, even if there is no scatter at all.
    if abs(change) <= max(by, 1e-9 * max(abs(before.value), abs(after.value))) or abs(change) < SURE * error:
        return 0
    return 1 if change > 0 else -1


def share_interval(share: float, num_rows: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of `num_rows` rows."""
    return wilson(min(round(share * num_rows), num_rows), num_rows)


def figures(value: float) -> str:
    """Formats a value with up to four significant digits, always without an exponent.

    >>> figures(0.69314), figures(-41.237), figures(12345.6), figures(0.0000012), figures(3)
    ('0.6931', '-41.24', '12,346', '0.0000012', '3')
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(float(f"{value:.4g}"), trim="-")
