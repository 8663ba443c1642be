"""The values of one metric over the steps of a run, and what they show in spite of noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def after_start(lines: Lines, *, has_reference: bool) -> Lines:
    """Leaves out the evaluation before the first step if there is a reference: every pair is a tie in it."""
    return [line for line in lines if line["step"] > 0] if has_reference else lines


def training(lines: Lines, name: str) -> list[Point]:
    """Returns a metric of the training lines; each is a mean over the steps since the training line before."""
    points, before = [], 0
    for line in lines:
        # Only training lines have the learning rate; the others are evaluations.
        if "learning_rate" not in line:
            continue
        value = line.get(name)
        if value is not None and math.isfinite(value):
            points.append(Point(line["step"], float(value), max(line["step"] - before, 1)))
        before = line["step"]
    return points


def held_out(lines: Lines, name: str) -> list[Point]:
    """Returns a metric of the evaluations."""
    found = [(line["step"], line.get(f"eval_{name}")) for line in lines]
    return [Point(step, float(value)) for step, value in found if value is not None and math.isfinite(value)]


def mean_of(points: Sequence[Point]) -> Mean:
    """Returns the mean of at least one point, weighted by steps."""
    steps = sum(point.num_steps for point in points)
    value = sum(point.value * point.num_steps for point in points) / steps
    error = math.inf
    if len(points) > 1:
        variance = sum(point.num_steps * (point.value - value) ** 2 for point in points) / steps
        error = math.sqrt(variance / (len(points) - 1))
    return Mean(value, error, points[0].step - points[0].num_steps + 1, points[-1].step, steps)


def last_quarter(points: Sequence[Point]) -> Mean | None:
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
