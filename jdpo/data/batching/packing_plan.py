"""The packing plan of a run: for every step, the items that share a row of slots.

An item is a pair or a supervised row. Planning is pure and reads sizes only, never tokens, so the shape of every step
is known before the first step. Axes: see `jdpo.data.batching.packing_shapes`; b items of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jdpo.data.batching.balance import balanced_bins
from jdpo.data.batching.packing_shapes import (
    MAX_SHAPES,
    SLOT_MULTIPLE,
    PackedShape,
    cheapest_shape,
    choose_shapes,
    rounded_shape,
)
from jdpo.types import AnyPair, TokenizedCompletion, completions_of


class ItemSizes(NamedTuple):
    """Sizes of items: int64 [items] each.

    Attributes:
      slots: P + C + R for a pair, the number of tokens for a supervised row.
      longest: tokens of the longest sequence.
      scored: tokens whose log-prob is needed; see `jdpo.data.batching.packing`.
      num_sides: sequences of each item, 2 or 1.
    """

    slots: np.ndarray
    longest: np.ndarray
    scored: np.ndarray
    num_sides: int

    def of(self, indices: np.ndarray) -> ItemSizes:
        """Selects the sizes of the given items."""
        return ItemSizes(self.slots[indices], self.longest[indices], self.scored[indices], self.num_sides)


def pair_sizes(lengths: np.ndarray) -> ItemSizes:
    """Returns the sizes of pairs, given the tokens of prompt, chosen and rejected, int [pairs, 3].

    >>> [array.tolist() for array in pair_sizes(np.array([[3, 2, 4], [0, 2, 1]]))[:3]]
    [[9, 3], [7, 2], [6, 1]]
    """
    lengths = np.asarray(lengths, np.int64)
    prompt, completions = lengths[:, 0], lengths[:, 1:]
    unpredicted = (prompt[:, None] == 0) & (completions > 0)  # no token predicts the first one
    return ItemSizes(
        lengths.sum(1), prompt + completions.max(1, initial=0), completions.sum(1) - unpredicted.sum(1), num_sides=2
    )


def completion_sizes(lengths: np.ndarray, scored: np.ndarray) -> ItemSizes:
    """Returns the sizes of supervised rows, given their tokens and the learnt tokens after the first, int [rows]."""
    lengths = np.asarray(lengths, np.int64)
    return ItemSizes(lengths, lengths, np.asarray(scored, np.int64), num_sides=1)


def item_sizes(rows: Iterable[AnyPair] | Iterable[TokenizedCompletion]) -> ItemSizes:
    """Returns the sizes of rows of one kind, reading each row."""
    pairs: list[tuple[int, int, int]] = []
    masked: list[int] = []
    completions: list[tuple[int, int]] = []
    for row in rows:
        if isinstance(row, TokenizedCompletion):
            completions.append((len(row.tokens), int(row.completion_mask[1:].sum())))
        else:
            pairs.append((len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)))
            masked.append(sum(int((~mask).sum()) for _, mask in completions_of(row)))
    assert bool(pairs) != bool(completions), (len(pairs), len(completions))
    if completions:
        return completion_sizes(*np.array(completions).T)
    sizes = pair_sizes(np.array(pairs))
    return sizes._replace(scored=sizes.scored - np.array(masked))


# --- the items of each row of slots


class StepBins(NamedTuple):
    """The bins of the items of a step.

    Attributes:
      num_micro: micro-batches of the step.
      bin_of: int64 [b], micro-batch * m + row, below num_micro * m.
    """

    num_micro: int
    bin_of: np.ndarray


def plan_step(
    slots: np.ndarray, *, num_rows: int, max_slots: int | None = None, max_items: int | None = None
) -> StepBins:
    """Distributes a step's items over rows with about equally many slots, in the fewest micro-batches.

    Pure in its arguments; ties are decided by the order of items and rows. Items are never cut: one longer than
    max_slots raises the limit to its own length. Rows may stay empty.

    Args:
      slots: int [b], slots of each item.
      num_rows: m.
      max_slots: maximum number of slots per row; None: no limit.
      max_items: maximum number of items per row; None: no limit.

    >>> plan_step(np.array([5, 3, 4, 2]), num_rows=2, max_slots=7)
    StepBins(num_micro=1, bin_of=array([0, 1, 1, 0]))
    """
    assert min(len(slots), num_rows) >= 1, (len(slots), num_rows)
    most_items = len(slots) if max_items is None else max_items
    limit = max(max_slots or int(slots.sum()), int(slots.max()), 1)
    # A lower bound; items cannot be cut, so more micro-batches may be needed.
    num_micro = max(-(-len(slots) // (num_rows * most_items)), -(-int(slots.sum()) // (num_rows * limit)))
    while True:
        bin_of, fullest = balanced_bins(slots, num_micro * num_rows, most_items, limit)
        if fullest <= limit:
            return StepBins(num_micro, bin_of)
        num_micro += 1


def needed_shape(sizes: ItemSizes, bins: StepBins, num_rows: int) -> PackedShape:
    """Returns the smallest shape that holds a step.

    Args:
      sizes: sizes of the step's items.
      bins: their bins.
      num_rows: m.
    """

    def fullest(values: np.ndarray) -> int:
        return int(np.max(np.bincount(bins.bin_of, weights=values)))

    return PackedShape(
        bins.num_micro,
        num_rows,
        fullest(np.ones(len(bins.bin_of))),
        fullest(sizes.slots),
        int(sizes.longest.max()),
        # Axes of length 0 would need programs of their own.
        max(fullest(sizes.scored), 1),
    )


# --- a run


class StepPlan(NamedTuple):
    """The bins of a step's items, and the shape of its batch."""

    bins: StepBins
    shape: PackedShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """The packing of each step of a run; see `plan_run`.

    Attributes:
      sizes: sizes of all items of the data.
      num_rows: m.
      max_slots: maximum number of slots per row, except for longer items, or None.
      max_items: maximum number of items per row, or None.
      shapes: the shapes of the run's steps, the most expensive last.
    """

    sizes: ItemSizes
    num_rows: int
    max_slots: int | None
    max_items: int | None
    shapes: tuple[PackedShape, ...]

    def step(self, indices: np.ndarray) -> StepPlan:
        """Plans the packing of the items `indices` [b] of the data.

        The batch has the cheapest of `shapes` that holds the items. If none does, which can happen for a step that was
        not among those given to `plan_run`, it has a shape of its own.
        """
        sizes = self.sizes.of(indices)
        bins = plan_step(sizes.slots, num_rows=self.num_rows, max_slots=self.max_slots, max_items=self.max_items)
        need = needed_shape(sizes, bins, self.num_rows)
        shape = cheapest_shape(need, self.shapes, num_sides=sizes.num_sides)
        return StepPlan(bins, rounded_shape(need) if shape is None else shape)


def plan_run(
    sizes: ItemSizes,
    steps: Iterable[np.ndarray],
    *,
    num_shards: int,
    max_tokens_per_device: int | None = None,
    micro_batch_size: int | None = None,
    max_shapes: int = MAX_SHAPES,
) -> PackingPlan:
    """Plans the packing of a run, in which a micro-batch has one row per shard.

    Args:
      sizes: sizes of all items of the data.
      steps: the items of every step of the run, int [b] each (`jdpo.data.batching.loader.plan`).
      num_shards: number of parts that a micro-batch is split into.
      max_tokens_per_device: maximum number of slots per row; ignored if micro_batch_size is given.
      micro_batch_size: maximum number of items per row.
      max_shapes: maximum number of shapes of all steps.

    Raises:
      ValueError: neither limit is given, or max_tokens_per_device is below SLOT_MULTIPLE.
    """
    max_slots = None
    if micro_batch_size is None and max_tokens_per_device is not None:
        max_slots = max_tokens_per_device // SLOT_MULTIPLE * SLOT_MULTIPLE
    if not (max_slots or micro_batch_size):
        raise ValueError(
            f"expected micro_batch_size of at least 1 or max_tokens_per_device of at least {SLOT_MULTIPLE}, "
            f"found {micro_batch_size} and {max_tokens_per_device}"
        )
    needs = []
    for indices in steps:
        of_step = sizes.of(indices)
        bins = plan_step(of_step.slots, num_rows=num_shards, max_slots=max_slots, max_items=micro_batch_size)
        # The bins are computed again when the step is packed; keeping them would take memory for every row.
        needs.append(needed_shape(of_step, bins, num_shards))
    return PackingPlan(
        sizes=sizes,
        num_rows=num_shards,
        max_slots=max_slots,
        max_items=micro_batch_size,
        shapes=choose_shapes(needs, num_sides=sizes.num_sides, max_shapes=max_shapes),
    )
