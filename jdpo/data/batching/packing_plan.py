"""The packing plan of a run: for every step, the items that share a row of slots.

An item is a pair or a supervised row. Planning is pure and reads sizes only, never tokens, so the shape of every step
is known before the first step. Axes: see `jdpo.data.batching.packing_shapes`; b items of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jdpo.data.batching.attention_rows import join_sequences
from jdpo.data.batching.balance import balanced_bins, even_out
from jdpo.data.batching.packing_shapes import (
    IMPOSSIBLE,
    MAX_SHAPES,
    SLOT_MULTIPLE,
    PackedShape,
    StepNeeds,
    cheapest_shape,
    choose_shapes,
    own_shape,
    row_lengths,
)
from jdpo.types import AnyPair, TokenizedCompletion, completions_of


class ItemSizes(NamedTuple):
    """Sizes of items, int64.

    Attributes:
      slots: [items], P + C + R for a pair, the number of tokens for a supervised row.
      sequences: [items, n], tokens of the sequence of each side: P + C and P + R for a pair.
      scored: [items], tokens whose log-prob is needed; see `jdpo.data.batching.packing`.
    """

    slots: np.ndarray
    sequences: np.ndarray
    scored: np.ndarray

    @property
    def num_sides(self) -> int:
        """Sequences of each item, 2 or 1."""
        return int(self.sequences.shape[1])

    @property
    def longest(self) -> np.ndarray:
        """[items], tokens of the longest sequence of each."""
        longest: np.ndarray = self.sequences.max(1)
        return longest

    def of(self, indices: np.ndarray) -> ItemSizes:
        """Selects the sizes of the given items."""
        return ItemSizes(self.slots[indices], self.sequences[indices], self.scored[indices])


def pair_sizes(lengths: np.ndarray) -> ItemSizes:
    """Returns the sizes of pairs, given the tokens of prompt, chosen and rejected, int [pairs, 3].

    >>> [array.tolist() for array in pair_sizes(np.array([[3, 2, 4], [0, 2, 1]]))]
    [[9, 3], [[5, 7], [2, 1]], [6, 1]]
    """
    lengths = np.asarray(lengths, np.int64)
    prompt, completions = lengths[:, 0], lengths[:, 1:]
    unpredicted = (prompt[:, None] == 0) & (completions > 0)  # no token predicts the first one
    return ItemSizes(lengths.sum(1), prompt[:, None] + completions, completions.sum(1) - unpredicted.sum(1))


def completion_sizes(lengths: np.ndarray, scored: np.ndarray) -> ItemSizes:
    """Returns the sizes of supervised rows, given their tokens and the learnt tokens after the first, int [rows]."""
    lengths = np.asarray(lengths, np.int64)
    return ItemSizes(lengths, lengths[:, None], np.asarray(scored, np.int64))


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
    slots: np.ndarray,
    *,
    num_rows: int,
    max_slots: int | None = None,
    max_items: int | None = None,
    tokens: np.ndarray | None = None,
) -> StepBins:
    """Distributes a step's items over rows with about equally many slots, in the fewest micro-batches.

    Pure in its arguments; ties are decided by the order of items and rows. Items are never cut: one longer than
    max_slots raises the limit to its own length. Rows may stay empty.

    Args:
      slots: int [b], slots of each item.
      num_rows: m.
      max_slots: maximum number of slots per row; None: no limit.
      max_items: maximum number of items per row; None: no limit.
      tokens: int [b], tokens of all sequences of each item, to be distributed evenly, too; None: they do not matter.

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
            if tokens is not None and num_micro * num_rows > 1:
                even_out(tokens, slots, bin_of, num_micro * num_rows)
            return StepBins(num_micro, bin_of)
        num_micro += 1


def needed_sizes(
    sizes: ItemSizes, bins: StepBins, num_rows: int, lengths: np.ndarray, sequences_per_row: int | None
) -> StepNeeds:
    """Returns the smallest sizes that hold a step.

    Args:
      sizes: sizes of the step's items.
      bins: their bins.
      num_rows: m.
      lengths: int64 [lengths], the lengths that attention rows may have, in ascending order.
      sequences_per_row: maximum number of sequences of an attention row; None: no limit.
    """

    def fullest(values: np.ndarray) -> int:
        return int(np.max(np.bincount(bins.bin_of, weights=values)))

    num_items = fullest(np.ones(len(bins.bin_of)))
    rows, per_row = np.full(len(lengths), IMPOSSIBLE), np.ones(len(lengths), np.int64)
    possible = range(int(np.searchsorted(lengths, sizes.longest.max())), len(lengths))
    if sequences_per_row == 1:
        rows[possible.start :] = sizes.num_sides * num_items
    else:
        of_bins = sequences_of_bins(sizes, bins)
        for index in possible:
            rows[index], per_row[index] = _most_rows(of_bins, int(lengths[index]), sequences_per_row)
    # Axes of length 0 would need programs of their own.
    return StepNeeds(
        bins.num_micro, num_rows, num_items, fullest(sizes.slots), max(fullest(sizes.scored), 1), rows, per_row
    )


def sequences_of_bins(sizes: ItemSizes, bins: StepBins) -> list[np.ndarray]:
    """Returns the lengths of the sequences of every bin with items, int64 [sequences]; sides of an item together."""
    order = np.argsort(bins.bin_of, kind="stable")
    ends = np.flatnonzero(np.diff(bins.bin_of[order])) + 1
    return [of_bin.reshape(-1) for of_bin in np.split(sizes.sequences[order], ends)]


def _most_rows(of_bins: list[np.ndarray], length: int, sequences_per_row: int | None) -> tuple[int, int]:
    """Returns the attention rows of the bin with the most, and the sequences of the row with the most."""
    joined = [join_sequences(sequences, length, sequences_per_row) for sequences in of_bins]
    return max(int(rows.row.max()) for rows in joined) + 1, max(int(rows.number.max()) for rows in joined) + 1


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
      sequences_per_row: maximum number of sequences of an attention row, or None.
      lengths: int64 [lengths], the lengths that attention rows may have.
      shapes: the shapes of the run's steps, the most expensive last.
    """

    sizes: ItemSizes
    num_rows: int
    max_slots: int | None
    max_items: int | None
    sequences_per_row: int | None
    lengths: np.ndarray
    shapes: tuple[PackedShape, ...]

    def step(self, indices: np.ndarray) -> StepPlan:
        """Plans the packing of the items `indices` [b] of the data.

        The batch has the cheapest of `shapes` that holds the items. If none does, which can happen for a step that was
        not among those given to `plan_run`, it has a shape of its own.
        """
        bins, need = self.needs(indices)
        return StepPlan(bins, cheapest_shape(need, self.shapes, self.lengths) or own_shape(need, self.lengths))

    def needs(self, indices: np.ndarray) -> tuple[StepBins, StepNeeds]:
        """Distributes the items `indices` [b] of the data over bins; returns them and the sizes that they need."""
        sizes = self.sizes.of(indices)
        bins = plan_step(
            sizes.slots,
            num_rows=self.num_rows,
            max_slots=self.max_slots,
            max_items=self.max_items,
            tokens=None if self.sequences_per_row == 1 or sizes.num_sides == 1 else sizes.sequences.sum(1),
        )
        return bins, needed_sizes(sizes, bins, self.num_rows, self.lengths, self.sequences_per_row)


def plan_run(
    sizes: ItemSizes,
    steps: Iterable[np.ndarray],
    *,
    num_shards: int,
    max_tokens_per_device: int | None = None,
    micro_batch_size: int | None = None,
    sequences_per_row: int | None = 1,
    padded_length: Callable[[int], int] = lambda length: length,
    max_shapes: int = MAX_SHAPES,
) -> PackingPlan:
    """Plans the packing of a run, in which a micro-batch has one row per shard.

    Args:
      sizes: sizes of all items of the data.
      steps: the items of every step of the run, int [b] each (`jdpo.data.batching.loader.plan`).
      num_shards: number of parts that a micro-batch is split into.
      max_tokens_per_device: maximum number of slots per row; ignored if micro_batch_size is given.
      micro_batch_size: maximum number of items per row.
      sequences_per_row: maximum number of sequences of an attention row; None: as many as fit into it.
      padded_length: length of an attention row -> the places that attention computes for it.
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
    plan = PackingPlan(
        sizes=sizes,
        num_rows=num_shards,
        max_slots=max_slots,
        max_items=micro_batch_size,
        sequences_per_row=sequences_per_row,
        # One set of lengths for all items, so that steps can share a shape.
        lengths=row_lengths(int(sizes.longest.max()), padded_length),
        shapes=(),
    )
    # The bins are computed again when a step is packed; keeping them would take memory for every row.
    needs = [plan.needs(indices)[1] for indices in steps]
    return dataclasses.replace(plan, shapes=choose_shapes(needs, plan.lengths, max_shapes=max_shapes))
