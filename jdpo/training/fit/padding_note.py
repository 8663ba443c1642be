"""A note on a batch too small for its devices, with the padding that a larger batch or fewer devices would have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jdpo.data.batching.packing_plan import PackingPlan, plan_run
from jdpo.words import figure, percent

WASTEFUL = 0.25
"""Share of padding from which it is worth a note."""

FEW_ROWS = 8
"""With more rows per device than this, a device's rows have about the same number of tokens in every step."""

GOOD = 0.15
"""Share of padding that a suggestion should reach."""

FACTORS = (2, 4, 8)
"""How many times the batch size is tried, and by how much the devices are divided."""

SAMPLED = 32
"""Steps that are planned for each suggestion, spread evenly over the run."""


class Remedy(NamedTuple):
    """A batch size, or a number of devices that split a batch, and its share of padding."""

    size: int
    padding: float


def padding_note(plan: PackingPlan, rows_of: Callable[[int], np.ndarray], num_steps: int, *, unit: str) -> str | None:
    """Returns a line for the user if much of the batches is padding because a device has few rows per step.

    All figures come from planning a sample of the run's steps, so they are the same on every process.

    Args:
      plan: of the run.
      rows_of: step -> its rows, int [b].
      num_steps: steps of the run.
      unit: what rows are called, such as "pairs".
    """
    steps = [rows_of(step) for step in _spread_over(num_steps, SAMPLED)]
    batch_size = max(map(len, steps))
    if plan.num_rows == 1 or batch_size > FEW_ROWS * plan.num_rows:
        return None
    padding = _padding(plan, steps)
    if padding <= WASTEFUL:
        return None

    def padding_with(groups: Sequence[np.ndarray], num_rows: int) -> float:
        trial = plan_run(
            plan.sizes,
            groups,
            num_shards=num_rows,
            max_tokens_per_device=plan.max_slots,
            micro_batch_size=plan.max_items,
            sequences_per_row=plan.sequences_per_row,
            max_shapes=len(plan.shapes),
        )
        return _padding(trial, groups)

    # The rows of consecutive steps together are steps of a larger batch.
    batches = (
        Remedy(factor * batch_size, padding_with(_larger(rows_of, num_steps, factor), plan.num_rows))
        for factor in FACTORS
        if factor <= num_steps
    )
    devices = (
        Remedy(plan.num_rows // factor, padding_with(steps, plan.num_rows // factor))
        for factor in FACTORS
        if plan.num_rows % factor == 0
    )
    return _line(
        padding, batch_size // plan.num_rows, unit, _first_good(batches, padding), _first_good(devices, padding)
    )


def _padding(plan: PackingPlan, steps: Sequence[np.ndarray]) -> float:
    """Returns the share of the slots of these steps that hold no token."""
    shapes = [plan.step(rows).shape for rows in steps]
    num_slots = sum(shape.num_micro * shape.num_rows * shape.num_slots for shape in shapes)
    return 1 - sum(int(plan.sizes.slots[rows].sum()) for rows in steps) / num_slots


def _larger(rows_of: Callable[[int], np.ndarray], num_steps: int, factor: int) -> list[np.ndarray]:
    firsts = _spread_over(num_steps // factor, SAMPLED)
    return [np.concatenate([rows_of(factor * first + place) for place in range(factor)]) for first in firsts]


def _spread_over(num_steps: int, most: int) -> list[int]:
    """Returns at most so many numbers below num_steps, evenly spaced.

    >>> _spread_over(3, 5), _spread_over(100, 4)
    ([0, 1, 2], [0, 25, 50, 75])
    """
    number = min(num_steps, most)
    return [index * num_steps // number for index in range(number)]


def _first_good(remedies: Iterable[Remedy], padding: float) -> Remedy | None:
    """Returns the smallest change with little padding, else the one with the least, if that is half of today's."""
    tried: list[Remedy] = []
    for remedy in remedies:
        if remedy.padding <= GOOD:
            return remedy
        tried.append(remedy)
    best = min(tried, key=lambda remedy: remedy.padding, default=None)
    return best if best is not None and best.padding <= padding / 2 else None


def _line(padding: float, num_rows: int, unit: str, larger: Remedy | None, fewer: Remedy | None) -> str | None:
    would: list[str] = []
    if larger is not None:
        would.append(f"with global_batch_size {larger.size:,} it would be {percent(larger.padding)}")
    if fewer is not None:
        parts = figure(fewer.size, "part")
        would.append(
            f"with batches split into {parts} (fewer devices, or a larger mesh.tensor) {percent(fewer.padding)}"
        )
    if not would:  # the cause is another one
        return None
    rows = figure(num_rows, unit.removesuffix("s"))
    return (
        f"note: {percent(padding)} of the slots are padding, because a device has {rows} per step; {', '.join(would)}"
    )
