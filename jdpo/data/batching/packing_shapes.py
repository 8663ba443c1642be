"""The few shapes that the packed batches of a run come in: each shape is a program to compile.

Axes, of all of packing: k micro-batches one after the other, m rows of a micro-batch (over all shards), s slots of a
row, p items of a row, n sides of an item (2 of a pair, 1 of a supervised row), q = n * p attention sequences of a row,
t places of a sequence, c scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SLOT_MULTIPLE, LENGTH_MULTIPLE, SCORED_MULTIPLE = 64, 64, 64
"""What s, t and c are multiples of."""

MAX_SHAPES = 8
"""Shapes of a run at most: each costs a compilation."""

ENOUGH = 0.005
"""Shapes are merged on, below MAX_SHAPES too, as long as all steps together cost no more than this share more."""

MOST_REFINEMENTS = 10
"""Of the merged shapes; each makes all steps together cheaper."""

MERGED_AT_ONCE = 512
"""Shapes that merging starts with at most: it takes time as the square of them."""


COST_OF_SCORED, COST_OF_PLACE = 0.05, 0.05
"""What room for a scored token and a place of an attention sequence cost, in the time of one slot.

A slot runs through all matrices, used or not. The head skips chunks without a scored token, and attention what lies
behind a sequence's length; left are a share of a chunk, and gathers and scatters. The plain attention path skips
nothing and computes t scores a place, which is not counted: where it is asked for by name, steps of short sequences may
share a shape with longer ones at a higher price than is reckoned here.
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


def choose_shapes(needs: Sequence[PackedShape], *, num_sides: int) -> tuple[PackedShape, ...]:
    """At most MAX_SHAPES that hold every step of a run, at about the least cost of all steps; the costliest comes last.

    Starting from each step's own shape, the two whose union costs least are merged until few enough are left.

    Args:
      needs: of every step, from `needed_shape`.
      num_sides: n.
    """
    assert len(needs) >= 1
    rounded = _round_up(np.array(needs, np.int64), _MULTIPLES)
    shapes = _merged(*_distinct(rounded), num_sides)
    for _ in range(MOST_REFINEMENTS):  # each step goes to its cheapest shape, which shrinks to what goes there
        chosen = _cheapest(rounded, shapes, num_sides)
        refined = np.array([rounded[chosen == index].max(0) for index in np.unique(chosen)])
        if np.array_equal(refined, shapes):
            break
        shapes = refined
    shapes = shapes[np.lexsort((*shapes.T, _cost(shapes, num_sides)))]
    return tuple(PackedShape(*map(int, shape)) for shape in shapes)


def rounded_shape(need: PackedShape) -> PackedShape:
    """A shape rounded up to the multiples of its axes."""
    return PackedShape(*_round_up(np.array(need), _MULTIPLES).tolist())


def _round_up(values: np.ndarray, multiples: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = -(-values // multiples) * multiples
    return rounded


def _distinct(needs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MERGED_AT_ONCE shapes [shapes, 6] that needs [needs, 6] fit in, and how many needs each stands for.

    Where there are more, they are rounded up further, but for k and m.
    """
    largest, coarser = needs.max(0), _MULTIPLES.copy()
    while True:
        shapes, counts = np.unique(_round_up(needs, coarser), axis=0, return_counts=True)
        if len(shapes) <= MERGED_AT_ONCE or (coarser[2:] >= largest[2:]).all():
            return shapes, counts
        coarser[2:] *= 2


def _merged(shapes: np.ndarray, counts: np.ndarray, num_sides: int) -> np.ndarray:
    """Unions of shapes [shapes, 6], of which counts [shapes] steps have need."""
    shapes, counts = shapes.copy(), counts.copy()

    def extra_costs(index: int) -> np.ndarray:
        """What merging a shape with each other one adds to the cost of all steps."""
        merged, own = _cost(np.maximum(shapes[index], shapes), num_sides), _cost(shapes, num_sides)
        return (merged - own) * counts + (merged - own[index]) * counts[index]

    left, spent = len(shapes), 0.0
    to_spend = ENOUGH * float(_cost(shapes, num_sides) @ counts)
    extra = np.full((left, left), np.inf)  # of i and j at [i, j] where j < i
    for i in range(left):
        extra[i, :i] = extra_costs(i)[:i]
    while left > 1:
        i, j = divmod(int(np.argmin(extra)), len(shapes))
        if left <= MAX_SHAPES and spent + extra[i, j] > to_spend:
            break
        spent, left = spent + extra[i, j], left - 1
        shapes[i], counts[i], counts[j] = np.maximum(shapes[i], shapes[j]), counts[i] + counts[j], 0
        extra[j], extra[:, j] = np.inf, np.inf
        renewed = np.where(counts > 0, extra_costs(i), np.inf)
        extra[i, :i], extra[i + 1 :, i] = renewed[:i], renewed[i + 1 :]
    return shapes[counts > 0]


def _cost(shapes: np.ndarray, num_sides: int) -> np.ndarray:
    """What a step of each shape costs, float [...] for int [..., 6]."""
    num_micro, num_rows, num_items, num_slots, length, num_scored = np.moveaxis(shapes, -1, 0)
    places = num_sides * num_items * length
    return num_micro * num_rows * (num_slots + COST_OF_SCORED * num_scored + COST_OF_PLACE * places)


def cheapest_shape(need: PackedShape, shapes: Sequence[PackedShape], *, num_sides: int) -> PackedShape | None:
    """The cheapest of the shapes that hold a step; None where none does."""
    chosen = int(_cheapest(np.array([need]), np.array(shapes), num_sides)[0])
    return shapes[chosen] if chosen >= 0 else None


def _cheapest(needs: np.ndarray, shapes: np.ndarray, num_sides: int) -> np.ndarray:
    """The index of the cheapest of shapes [shapes, 6] that holds each of needs [needs, 6]; -1 where none does."""
    prices = np.where((needs[:, None] <= shapes).all(-1), _cost(shapes, num_sides), np.inf)
    return np.where(np.isfinite(prices.min(1)), prices.argmin(1), -1)
