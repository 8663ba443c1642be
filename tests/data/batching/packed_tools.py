"""Unpacks packed batches, for tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jdpo.types import PackedBatch


class Padding(NamedTuple):
    """Unused shares of a packed batch: of its slots, of its places in attention, of its scored tokens."""

    slots: float
    places: float
    scored: float


def padding_of(batch: PackedBatch) -> Padding:
    """Returns the share of a batch of numpy arrays that is padding."""
    num_places = np.prod(batch.gather.shape[-2:])
    used = batch.readers < num_places
    none = batch.readers.shape[-2] * batch.pair_weight.shape[-1]
    return Padding(
        1 - float(used.any(-2).mean()),
        1 - float(used.sum() / batch.gather.size),
        1 - float((batch.logp_pair < none).mean()),
    )


class UnpackedSide(NamedTuple):
    """One sequence of an item as attention and the head see it: vectors over its t tokens or its c scored tokens."""

    tokens: np.ndarray
    positions: np.ndarray
    scored: np.ndarray  # bool [t]
    predicted_from: np.ndarray  # [c], the position within the sequence whose hidden state predicts
    targets: np.ndarray  # [c]
    reference: np.ndarray | None  # [c]


def unpack(batch: PackedBatch) -> dict[int, tuple[UnpackedSide, ...]]:
    """Returns the sides of every item of a batch of numpy arrays, by data row: the inverse of `pack_step`.

    Reads the indices as a model does, so that a wrong one shows.
    """
    num_sides = batch.readers.shape[2]
    found = {}
    for k, m, item in np.argwhere(batch.pair_weight > 0).tolist():
        at = (k, m)
        sides = []
        for side in range(num_sides):
            slots = _slots_of(PackedBatch._make(None if array is None else array[at] for array in batch), item, side)
            c = np.flatnonzero(batch.logp_pair[at] == num_sides * item + side)
            predicted_from = np.array([int(np.flatnonzero(slots == slot)[0]) for slot in batch.logp_slot[at][c]], int)
            scored = np.zeros(len(slots), bool)
            scored[predicted_from + 1] = True
            sides.append(
                UnpackedSide(
                    batch.tokens[at][slots],
                    batch.positions[at][slots],
                    scored,
                    predicted_from,
                    batch.logp_target[at][c],
                    None if batch.logp_reference is None else batch.logp_reference[at][c],
                )
            )
        found[int(batch.pair_row[at][item])] = tuple(sides)
    return found


def _slots_of(row: PackedBatch, item: int, side: int) -> np.ndarray:
    """Returns the slots of one sequence of a row of slots, as its attention row reads them."""
    # Items are back to back, and side 0 reads the first slot of each.
    reads = row.readers < row.gather.size
    of_item = np.cumsum((row.positions == 0) & reads[0]) - 1 == item
    places = row.readers[side][of_item & reads[side]]
    number, first = divmod(int(places.min()), row.gather.shape[-1])
    # The sequence must be one of those that `lengths` names, from its first place to its last.
    starts = np.cumsum(row.lengths[number]) - row.lengths[number]
    (found,) = np.flatnonzero((starts == first) & (row.lengths[number] > 0))
    assert row.lengths[number][found] == len(places), (row.lengths[number], places)
    return row.gather[number, first : first + len(places)]
