"""The few shapes of a run's packed batches. Each shape is a program to compile.

Axes, of all of packing: k micro-batches one after the other, m rows of a micro-batch (over all shards), s slots of a
row, p items of a row, n sides of an item (2 of a pair, 1 of a supervised row), q = n * p attention sequences of a row,
t places of a sequence, c scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SLOT_MULTIPLE, LENGTH_MULTIPLE, SCORED_MULTIPLE = 64, 64, 64
"""s, t and c are multiples of these."""

MAX_SHAPES = 8
"""Maximum number of shapes per run unless the caller gives another, since each costs a compilation."""

ENOUGH = 0.005
"""Below the maximum number, shapes are merged as long as this raises the cost of all steps by at most this share."""

WORTH_A_PROGRAM = 4096
"""Shapes are also merged as long as this costs at most so many slots in all steps together: to compile one more program
takes longer. In a short run, such as one of a toy, the compilations would take most of the time."""

MOST_REFINEMENTS = 10
"""Maximum number of refinements of the merged shapes; each makes all steps together cheaper."""

MERGED_AT_ONCE = 512
"""Maximum number of shapes that merging starts with; its time grows with their square."""


COST_OF_SCORED, COST_OF_PLACE = 0.05, 0.05
"""Cost of an unused scored token and of an unused place of an attention sequence, in units of one slot's time.

Every slot runs through all matrices, used or not. The head skips chunks without a scored token, and attention skips the
places after a sequence's end; what remains is part of a chunk, and gathers and scatters. The XLA attention path skips
nothing and computes t scores per place, which is not counted: with `attention: xla`, short steps that share a shape
with longer ones cost more than estimated here.
"""

_MULTIPLES = np.array((1, 1, 1, SLOT_MULTIPLE, LENGTH_MULTIPLE, SCORED_MULTIPLE))  # of each field of a PackedShape


class PackedShape(NamedTuple):
    """Sizes of the axes of a packed batch; q is n * num_items."""

    num_micro: int  # k
    num_rows: int  # m
    num_items: int  # p
    num_slots: int  # s
    length: int  # t
    num_scored: int  # c


def choose_shapes(
    needs: Sequence[PackedShape], *, num_sides: int, max_shapes: int = MAX_SHAPES
) -> tuple[PackedShape, ...]:
    """Chooses at most `max_shapes` shapes that hold every step of a run, at about the least total cost.

    Starts with each step's own shape and merges the two shapes whose union adds the least cost until few enough remain.

    Args:
      needs: the smallest shape of every step, from `needed_shape`.
      num_sides: n.

    Returns:
      The shapes, the most expensive last.
    """
    assert len(needs) >= 1
    rounded = _round_up(np.array(needs, np.int64), _MULTIPLES)
    shapes = _merged(*_distinct(rounded), num_sides, max_shapes)
    for _ in range(MOST_REFINEMENTS):  # assign each step to its cheapest shape, then shrink shapes to their steps
        chosen = _cheapest(rounded, shapes, num_sides)
        refined = np.array([rounded[chosen == index].max(0) for index in np.unique(chosen)])
        if np.array_equal(refined, shapes):
            break
        shapes = refined
    # By cost, and by the sizes where costs are equal, so that every host has the same order.
    shapes = shapes[np.lexsort((*shapes.T, _cost(shapes, num_sides)))]
    return tuple(PackedShape(*map(int, shape)) for shape in shapes)


def rounded_shape(need: PackedShape) -> PackedShape:
    """Rounds a shape up to the multiples of its axes."""
    return PackedShape(*_round_up(np.array(need), _MULTIPLES).tolist())


def _round_up(values: np.ndarray, multiples: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = -(-values // multiples) * multiples
    return rounded


def _distinct(needs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most MERGED_AT_ONCE shapes [shapes, 6] that hold needs [needs, 6], and the number of needs of each.

    If there are more shapes, all axes except k and m are rounded up further.
    """
    largest, coarser = needs.max(0), _MULTIPLES.copy()
    while True:
        shapes, counts = np.unique(_round_up(needs, coarser), axis=0, return_counts=True)
        if len(shapes) <= MERGED_AT_ONCE or (coarser[2:] >= largest[2:]).all():
            return shapes, counts
        # k and m are exact: a further micro-batch costs a whole pass, and m is the number of shards.
        coarser[2:] *= 2


def _merged(shapes: np.ndarray, counts: np.ndarray, num_sides: int, max_shapes: int) -> np.ndarray:
    """Merges shapes [shapes, 6], needed by counts [shapes] steps each, into few unions."""
    shapes, counts = shapes.copy(), counts.copy()

    def extra_costs(index: int) -> np.ndarray:
        """Returns the cost over all steps that merging one shape with each other shape adds."""
        merged, own = _cost(np.maximum(shapes[index], shapes), num_sides), _cost(shapes, num_sides)
        return (merged - own) * counts + (merged - own[index]) * counts[index]

    left, spent = len(shapes), 0.0
    to_spend = max(ENOUGH * float(_cost(shapes, num_sides) @ counts), WORTH_A_PROGRAM)
    extra = np.full((left, left), np.inf)  # of i and j at [i, j] where j < i
    for i in range(left):
        extra[i, :i] = extra_costs(i)[:i]
    while left > 1:
        i, j = divmod(int(np.argmin(extra)), len(shapes))
        # Few enough shapes, and the next merge would cost more than fewer compilations are worth.
        if left <= max_shapes and spent + extra[i, j] > to_spend:
            break
        spent, left = spent + extra[i, j], left - 1
        # Shape i becomes the union; shape j is not used any more, but keeps its place so that indices stay valid.
        shapes[i], counts[i], counts[j] = np.maximum(shapes[i], shapes[j]), counts[i] + counts[j], 0
        # inf is never the minimum, so shape j is not merged again.
        extra[j], extra[:, j] = np.inf, np.inf
        renewed = np.where(counts > 0, extra_costs(i), np.inf)
        extra[i, :i], extra[i + 1 :, i] = renewed[:i], renewed[i + 1 :]
    return shapes[counts > 0]


def _cost(shapes: np.ndarray, num_sides: int) -> np.ndarray:
    """Returns the cost of a step of each shape, float [...] for int [..., 6]."""
    num_micro, num_rows, num_items, num_slots, length, num_scored = np.moveaxis(shapes, -1, 0)
    places = num_sides * num_items * length
    return num_micro * num_rows * (num_slots + COST_OF_SCORED * num_scored + COST_OF_PLACE * places)


def cheapest_shape(need: PackedShape, shapes: Sequence[PackedShape], *, num_sides: int) -> PackedShape | None:
    """Returns the cheapest of the shapes that hold a step, or None."""
    chosen = int(_cheapest(np.array([need]), np.array(shapes), num_sides)[0])
    return shapes[chosen] if chosen >= 0 else None


def _cheapest(needs: np.ndarray, shapes: np.ndarray, num_sides: int) -> np.ndarray:
    """Returns, for each of needs [needs, 6], the index of the cheapest of shapes [shapes, 6] that holds it, or -1."""
    # A shape holds a step if it is at least as large on every axis.
    prices = np.where((needs[:, None] <= shapes).all(-1), _cost(shapes, num_sides), np.inf)
    return np.where(np.isfinite(prices.min(1)), prices.argmin(1), -1)
