"""The few shapes of a run's packed batches. Each shape is a program to compile.

Axes, of all of packing: k micro-batches one after the other, m rows of a micro-batch (over all shards), s slots of a
row, p items of a row, n sides of an item (2 of a pair, 1 of a supervised row), q attention rows of a row of slots,
u sequences of an attention row, t places of an attention row, c scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

SLOT_MULTIPLE, LENGTH_MULTIPLE, SCORED_MULTIPLE = 64, 64, 64
"""s, t and c are multiples of these."""

MOST_LENGTHS = 16
"""Maximum number of lengths of attention rows that a run chooses from."""

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


COST_OF_SCORED, COST_OF_PLACE, COST_OF_KEY = 0.05, 0.05, 0.05 / 1024
"""Cost of an unused scored token, of an unused place of an attention row, and of each place of that row in addition, in
units of one slot's time.

Every slot runs through all matrices, used or not. The head skips chunks without a scored token; what remains is part of
a chunk. A place is gathered and its output read back, whether a token is there or not. Splash and cuDNN compare it with
half of its row's places on average, whatever segment they belong to: segments mask tiles and do not skip them, so that
long rows cost more for each place. In a model of 1.5 B parameters, 1024 keys for each place are about 5 % of a slot's
work. Blockwise attention skips tiles that no query of a tile sees, and the places after the last sequence of a row.
"""

IMPOSSIBLE = 2**40
"""The number of attention rows where a sequence is longer than a row."""


class PackedShape(NamedTuple):
    """Sizes of the axes of a packed batch."""

    num_micro: int  # k
    num_rows: int  # m
    num_items: int  # p
    num_slots: int  # s
    num_attention_rows: int  # q
    sequences_per_row: int  # u
    length: int  # t
    num_scored: int  # c

    @property
    def num_places(self) -> int:
        """Places of all attention rows of the batch."""
        return self.num_micro * self.num_rows * self.num_attention_rows * self.length


class StepNeeds(NamedTuple):
    """The smallest sizes that hold a step.

    Attributes:
      num_micro, num_rows, num_items, num_slots, num_scored: as of `PackedShape`.
      attention_rows: int64 [lengths], attention rows of each row of slots, for each length that they may have;
        IMPOSSIBLE for lengths below that of a sequence.
      per_row: int64 [lengths], sequences of the attention row with the most.
    """

    num_micro: int
    num_rows: int
    num_items: int
    num_slots: int
    num_scored: int
    attention_rows: np.ndarray
    per_row: np.ndarray


_FIXED = len(StepNeeds._fields) - 2
"""Number of sizes before the attention rows at each length, in arrays [needs, sizes] of `StepNeeds`."""


def row_lengths(longest: int, padded_length: Callable[[int], int] = lambda length: length) -> np.ndarray:
    """Returns the lengths that the attention rows of a run may have: at most MOST_LENGTHS, the last one for all.

    Args:
      longest: tokens of the longest sequence.
      padded_length: length -> the places that attention computes for a row of it, which the row then has.

    >>> row_lengths(200), row_lengths(3000)[-2:]
    (array([ 64, 128, 192, 256]), array([2816, 3072]))
    """
    multiple = LENGTH_MULTIPLE
    while multiple * MOST_LENGTHS < longest:
        multiple *= 2
    lengths = range(multiple, longest + multiple, multiple)
    return np.unique(np.array([padded_length(length) for length in lengths], np.int64))


def choose_shapes(
    needs: Sequence[StepNeeds], lengths: np.ndarray, *, max_shapes: int = MAX_SHAPES
) -> tuple[PackedShape, ...]:
    """Chooses at most `max_shapes` shapes that hold every step of a run, at about the least total cost.

    Starts with each step's own shape and merges the two shapes whose union adds the least cost until few enough remain.
    A union has more slots and more attention rows; the length of its rows is then the cheapest that is possible.

    Args:
      needs: the smallest sizes of every step, from `needed_sizes`.
      lengths: int64 [lengths], of attention rows; see `row_lengths`.

    Returns:
      The shapes, the most expensive last.
    """
    assert len(needs) >= 1
    per_row = np.max([need.per_row for need in needs], axis=0)
    rounded = _rounded(needs)
    shapes = _merged(*_distinct(rounded), lengths, max_shapes)
    for _ in range(MOST_REFINEMENTS):  # assign each step to its cheapest shape, then shrink shapes to their steps
        chosen = _cheapest(rounded, shapes, lengths)
        refined = np.array([rounded[chosen == index].max(0) for index in np.unique(chosen)])
        if np.array_equal(refined, shapes):
            break
        shapes = refined
    found = {_shape_of(shape, lengths, per_row) for shape in shapes}
    # By cost, and by the sizes where costs are equal, so that every host has the same order.
    return tuple(sorted(found, key=lambda shape: (cost_of(shape), shape)))


def own_shape(need: StepNeeds, lengths: np.ndarray) -> PackedShape:
    """Returns the shape of a single step: its sizes rounded up to their multiples, with the cheapest attention rows."""
    return _shape_of(_rounded([need])[0], lengths, need.per_row)


def cost_of(shape: PackedShape) -> float:
    """Returns the cost of a step of this shape, in slots."""
    of_places = shape.num_attention_rows * shape.length * float(_place_cost(np.array(shape.length)))
    return shape.num_micro * shape.num_rows * (shape.num_slots + COST_OF_SCORED * shape.num_scored + of_places)


def _place_cost(lengths: np.ndarray) -> np.ndarray:
    """Returns the cost of one place of attention rows of these lengths."""
    cost: np.ndarray = COST_OF_PLACE + COST_OF_KEY * lengths
    return cost


def _rounded(needs: Sequence[StepNeeds]) -> np.ndarray:
    """Returns needs as an array int64 [needs, sizes]: the five sizes, rounded up, and the rows at each length."""
    sizes = np.array([(*need[:_FIXED], *need.attention_rows) for need in needs], np.int64)
    return _round_up(sizes, _multiples(sizes))


def _multiples(sizes: np.ndarray) -> np.ndarray:
    multiples = np.ones(sizes.shape[1], np.int64)
    multiples[3:_FIXED] = SLOT_MULTIPLE, SCORED_MULTIPLE
    return multiples


def _round_up(values: np.ndarray, multiples: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = -(-values // multiples) * multiples
    return rounded


def _shape_of(sizes: np.ndarray, lengths: np.ndarray, per_row: np.ndarray) -> PackedShape:
    index = int(np.argmin(_costs(sizes, lengths)))
    num_micro, num_rows, num_items, num_slots, num_scored = map(int, sizes[:_FIXED])
    return PackedShape(
        num_micro,
        num_rows,
        num_items,
        num_slots,
        int(sizes[_FIXED + index]),
        int(per_row[index]),
        int(lengths[index]),
        num_scored,
    )


def _distinct(needs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most MERGED_AT_ONCE shapes [shapes, sizes] that hold needs [needs, sizes], and the needs of each.

    If there are more shapes, all axes except k and m are rounded up further.
    """
    largest, coarser = np.where(needs < IMPOSSIBLE, needs, 0).max(0), _multiples(needs)
    while True:
        shapes, counts = np.unique(_round_up(needs, coarser), axis=0, return_counts=True)
        if len(shapes) <= MERGED_AT_ONCE or (coarser[2:] >= largest[2:]).all():
            return shapes, counts
        # k and m are exact: a further micro-batch costs a whole pass, and m is the number of shards.
        coarser[2:] *= 2


def _merged(shapes: np.ndarray, counts: np.ndarray, lengths: np.ndarray, max_shapes: int) -> np.ndarray:
    """Merges shapes [shapes, sizes], needed by counts [shapes] steps each, into few unions."""
    shapes, counts = shapes.copy(), counts.copy()
    own = _costs(shapes, lengths).min(-1)

    def extra_costs(index: int) -> np.ndarray:
        """Returns the cost over all steps that merging one shape with each other shape adds."""
        merged = _costs(np.maximum(shapes[index], shapes), lengths).min(-1)
        return (merged - own) * counts + (merged - own[index]) * counts[index]

    left, spent = len(shapes), 0.0
    to_spend = max(ENOUGH * float(own @ counts), WORTH_A_PROGRAM)
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
        own[i] = _costs(shapes[i], lengths).min(-1)
        # inf is never the minimum, so shape j is not merged again.
        extra[j], extra[:, j] = np.inf, np.inf
        renewed = np.where(counts > 0, extra_costs(i), np.inf)
        extra[i, :i], extra[i + 1 :, i] = renewed[:i], renewed[i + 1 :]
    return shapes[counts > 0]


def _costs(sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the costs of steps of these sizes with attention rows of each length, float [..., lengths]."""
    num_micro, num_rows, _, num_slots, num_scored = np.moveaxis(sizes[..., :_FIXED, None], -2, 0)
    of_places = sizes[..., _FIXED:] * (lengths * _place_cost(lengths))
    costs: np.ndarray = num_micro * num_rows * (num_slots + COST_OF_SCORED * num_scored + of_places)
    return costs


def cheapest_shape(need: StepNeeds, shapes: Sequence[PackedShape], lengths: np.ndarray) -> PackedShape | None:
    """Returns the cheapest of the shapes that hold a step, or None."""
    at = {int(length): index for index, length in enumerate(lengths)}
    holding = [
        shape
        for shape in shapes
        if all(needed <= getattr(shape, name) for name, needed in zip(StepNeeds._fields, need[:_FIXED], strict=False))
        and need.attention_rows[at[shape.length]] <= shape.num_attention_rows
        and need.per_row[at[shape.length]] <= shape.sequences_per_row
    ]
    return min(holding, key=cost_of, default=None)


def _cheapest(needs: np.ndarray, shapes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns, for each of needs [needs, sizes], the index of the cheapest of shapes [shapes, sizes] that holds it."""
    costs = _costs(shapes, lengths)
    # The rows of a batch have one length, where the shape is cheapest. A shape holds a step if it is at least as large
    # on every axis.
    read = np.concatenate(
        [np.broadcast_to(np.arange(_FIXED), (len(shapes), _FIXED)), _FIXED + costs.argmin(-1)[:, None]], 1
    )
    fits = np.stack(
        [(needs[:, columns] <= shape[columns]).all(-1) for columns, shape in zip(read, shapes, strict=True)], 1
    )
    chosen: np.ndarray = np.where(fits, costs.min(-1), np.inf).argmin(1)
    return chosen
