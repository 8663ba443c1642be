"""Distributes the items of a step over bins with about equally many slots, and tokens of attention sequences."""

from __future__ import annotations

import heapq

import numpy as np

from jdpo.data.batching.packing_shapes import SLOT_MULTIPLE

CLOSE = 1.004
"""A fullest bin of at most this many times its lower bound is good enough: with many items per bin it is by itself."""

SWAPS_PER_BIN = 4
"""Swaps at most, for each bin. Real steps need about one; the limit bounds the time of unusual ones."""


def balanced_bins(slots: np.ndarray, num_bins: int, max_items: int, limit: int) -> tuple[np.ndarray, int]:
    """Returns the bin of each item, int64 [b], and the slots of the fullest bin.

    Pure in its arguments; ties are decided by the order of items and bins.

    Args:
      slots: int [b], slots of each item.
      num_bins: number of bins; they may stay empty.
      max_items: maximum number of items per bin; all bins together hold the step.
      limit: slots that a bin should not exceed; it does where the items leave no choice, or none is found.

    >>> balanced_bins(np.array([500, 300, 400, 200]), 2, 4, 1000)
    (array([0, 1, 1, 0]), 700)
    """
    bin_of = np.zeros(len(slots), np.int64)
    if num_bins == 1:
        return bin_of, int(slots.sum())
    _longest_first(slots, bin_of, num_bins, max_items)
    return bin_of, _swapped(slots, bin_of, num_bins, limit)


def even_out(tokens: np.ndarray, slots: np.ndarray, bin_of: np.ndarray, num_bins: int) -> None:
    """Swaps items until the sequences of all bins have about equally many tokens; no bin becomes fuller in slots.

    Pairs with as many slots differ in the length of their prompt, which their sequences have twice. Changes bin_of.

    Args:
      tokens: int [b], tokens of the sequences of each item: 2P + C + R of a pair.
      slots: int [b], slots of each item.
      bin_of: int64 [b], from `balanced_bins`.
      num_bins: number of bins.
    """
    read, used = (np.bincount(bin_of, weights=x, minlength=num_bins).astype(np.int64) for x in (tokens, slots))
    most, enough = int(used.max()), int(least_slots(tokens, num_bins) * CLOSE)
    for _ in range(SWAPS_PER_BIN * num_bins):
        fullest = int(read.argmax())
        if read[fullest] <= enough:
            break
        given = np.flatnonzero(bin_of == fullest)
        # The bin with the fewest tokens takes the most; all others are searched only if that fails.
        for taken in (np.flatnonzero(bin_of == read.argmin()), np.arange(len(slots))):
            moved, in_slots = (x[given][:, None] - x[taken] for x in (tokens, slots))
            gain = np.minimum(moved, read[fullest] - read[bin_of[taken]] - moved)
            fits = (used[fullest] - in_slots <= most) & (used[bin_of[taken]] + in_slots <= most)
            best = int(np.where(fits, gain, 0).argmax()) if gain.size else 0
            if gain.size and fits.flat[best] and gain.flat[best] > 0:
                break
        else:
            return
        give, take = given[best // len(taken)], taken[best % len(taken)]
        other = int(bin_of[take])
        for of_bins, change in ((read, moved.flat[best]), (used, in_slots.flat[best])):
            of_bins[fullest] -= change
            of_bins[other] += change
        bin_of[give], bin_of[take] = other, fullest


def least_slots(slots: np.ndarray, num_bins: int) -> int:
    """Returns a lower bound on the slots of the fullest bin: the longest item, or the mean of the bins."""
    return max(int(slots.max()), -(-int(slots.sum()) // num_bins))


def _longest_first(slots: np.ndarray, bin_of: np.ndarray, num_bins: int, max_items: int) -> None:
    """Writes bins into bin_of [b]: items, the longest first, go into the emptiest bin."""
    heap = [(0, index, 0) for index in range(num_bins)]  # slots, bin, items
    # stable makes ties the same on every host.
    for item in np.argsort(-slots, kind="stable").tolist():
        used, index, num_items = heap[0]
        bin_of[item], num_items = index, num_items + 1
        # A full bin leaves the heap, so that later items go elsewhere.
        if num_items < max_items:
            heapq.heapreplace(heap, (used + int(slots[item]), index, num_items))
        else:
            heapq.heappop(heap)


def _swapped(slots: np.ndarray, bin_of: np.ndarray, num_bins: int, limit: int) -> int:
    """Swaps items of the fullest bin with items of others while that helps, and returns the slots of the fullest.

    With few items per bin, the longest first leave the fullest bin some percent above the mean. Swaps keep the number
    of items of each bin. Changes bin_of.
    """
    used = np.bincount(bin_of, weights=slots, minlength=num_bins).astype(np.int64)
    bound = least_slots(slots, num_bins)
    # Shapes are multiples, so a fullest bin below the next multiple of the bound gains nothing.
    enough = max(-(-bound // SLOT_MULTIPLE) * SLOT_MULTIPLE, int(bound * CLOSE))
    # Above the limit, the step would need another micro-batch.
    enough = min(enough, limit) if bound <= limit else enough
    for _ in range(SWAPS_PER_BIN * num_bins):
        fullest = int(used.argmax())
        if used[fullest] <= enough:
            break
        given = np.flatnonzero(bin_of == fullest)
        gap = used[fullest] - used[bin_of]  # [b], to the bin of each item
        moved = slots[given][:, None] - slots
        # Of both bins the fuller one has this many slots fewer than the fullest has now: at most half of the gap.
        gain = np.minimum(moved, gap - moved)
        give, take = divmod(int(gain.argmax()), len(slots))
        if gain[give, take] <= 0:
            break
        other = int(bin_of[take])
        used[fullest] -= moved[give, take]
        used[other] += moved[give, take]
        bin_of[given[give]], bin_of[take] = other, fullest
    return int(used.max())
