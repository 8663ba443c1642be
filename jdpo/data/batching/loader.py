"""The rows of each step, and padded batches of them.

Planning is pure: resuming needs a step number only.
Legend: b pairs (slots), n=2 sides, t token positions.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from jdpo.data.batching.mixing import Mixture, epoch_order, permutation
from jdpo.types import AnyPair, CompletionBatch, PreferenceBatch, TokenizedCompletion, completions_of

T = TypeVar("T")

SMALLEST_BUCKET = 32

WINDOW_STEPS = 16
"""`group_by_length` sorts the rows of this many steps together; on larger scales the order stays random."""

_GROUPING = 0x6C656E
"""Part of the key for the order of grouped steps, so that it differs from orders of rows with the same seed."""


def num_steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Returns the number of steps that pass over all rows once; the last step holds the remainder.

    >>> num_steps_per_epoch(10, 4)
    3
    """
    return -(-num_rows // global_batch_size)


def plan(step: int, *, num_rows: int, global_batch_size: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the rows of one step: int64 indices [global_batch_size], fewer in the last step of an epoch.

    Pure in its arguments. Each epoch passes over every row once, in an order that (seed, epoch) determines.
    `RowPlan` does the same for a mixture of datasets.

    >>> [plan(step, num_rows=5, global_batch_size=2, seed=0, shuffle=False).tolist() for step in range(4)]
    [[0, 1], [2, 3], [4], [0, 1]]
    """
    epoch, position = divmod(step, num_steps_per_epoch(num_rows, global_batch_size))
    order = epoch_order(Mixture((num_rows,), (num_rows,)), seed, epoch, shuffle)
    return order[position * global_batch_size : (position + 1) * global_batch_size].copy()


class RowPlan:
    """The rows of every step of a run. It has no state, so resuming needs a step number only.

    A step has exactly global_batch_size rows; the last step of an epoch has the remainder. Every process plans the
    whole step, so a run that continues on another number of hosts sees the same rows.

    Attributes:
      mixture: the number of rows that an epoch takes from each dataset.
      steps_per_epoch: number of steps; the last one holds the remainder.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        lengths: np.ndarray | None = None,
    ) -> None:
        """Plans the steps.

        Args:
          lengths: int [rows], lengths to group by: the rows of every WINDOW_STEPS steps are sorted by length and cut
            into steps again, which follow in a random order. None: no grouping.
        """
        assert lengths is None or (shuffle and len(lengths) == sum(mixture.sizes)), "lengths of all rows, shuffled"
        self.mixture, self._size = mixture, global_batch_size
        self._seed, self._shuffle, self._lengths = seed, shuffle, lengths
        self.steps_per_epoch = num_steps_per_epoch(mixture.num_examples, global_batch_size)
        # Two epochs, because prefetching reads the next one while the last steps of this one are taken.
        self._grouped = functools.lru_cache(maxsize=2)(self._group)

    def step(self, step: int) -> np.ndarray:
        """Returns the rows of one step: int64 [global_batch_size], fewer in the last step of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._lengths is None:
            order = epoch_order(self.mixture, self._seed, epoch, self._shuffle)
        else:
            order = self._grouped(epoch)
        # A copy, because the order is cached and shared.
        return order[position * self._size : (position + 1) * self._size].copy()

    def _group(self, epoch: int) -> np.ndarray:
        """Returns the order of an epoch with rows grouped by length; the remainder of the epoch is not grouped."""
        assert self._lengths is not None
        order = epoch_order(self.mixture, self._seed, epoch, self._shuffle).copy()
        # Sorted with the others, the remainder would always be the longest rows.
        num_full = len(order) // self._size
        # Sorting within windows keeps long and short steps spread over the epoch.
        for window, first in enumerate(range(0, num_full, WINDOW_STEPS)):
            num_steps = min(WINDOW_STEPS, num_full - first)
            inside = slice(first * self._size, (first + num_steps) * self._size)
            rows = order[inside]
            by_length = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(num_steps, self._size)
            order[inside] = by_length[permutation(num_steps, self._seed, epoch, window, _GROUPING)].reshape(-1)
        return order


def bucket_length(n: int, max_length: int) -> int:
    """Returns the padded length for sequences of up to `n` tokens: one of few, so that few shapes are compiled.

    It is the next number of the form 2^k or 1.5 * 2^k, at least 32, at most `max_length` rounded up to a multiple of 8.

    >>> [bucket_length(n, 1000) for n in (1, 33, 65, 97, 900)]
    [32, 48, 96, 128, 1000]
    """
    assert 0 < n <= max_length, (n, max_length)
    power = SMALLEST_BUCKET
    while power < n:
        power *= 2
    # 1.5 * 2^(k - 1) is between 2^(k - 1) and 2^k: padding wastes at most a third.
    bucket = power * 3 // 4 if power > SMALLEST_BUCKET and n <= power * 3 // 4 else power
    return min(bucket, -(-max_length // 8) * 8)


def collate_pairs(pairs: Sequence[AnyPair], *, num_slots: int, length: int, pad_token_id: int) -> PreferenceBatch:
    """Lays out pairs as a right-padded batch, tokens int32 [num_slots, 2, length].

    Slots after the last pair hold padding pairs: weight 0, one attended token (attention over nothing is NaN), no
    completion. Masks come from lengths, so a pad token that is also the EOS hides no real EOS.

        prompt 5 6, chosen 7 2, rejected 8    length 5, pad 2
        tokens           [[5 6 7 2 2] [5 6 8 2 2]]
        attention_mask   [[1 1 1 1 0] [1 1 1 0 0]]
        completion_mask  [[0 0 1 1 0] [0 0 1 0 0]]
    """
    assert len(pairs) <= num_slots, (len(pairs), num_slots)
    tokens = np.full((num_slots, 2, length), pad_token_id, np.int32)
    attention_mask = np.zeros((num_slots, 2, length), bool)
    completion_mask = np.zeros((num_slots, 2, length), bool)
    for index, pair in enumerate(pairs):
        start = len(pair.prompt_ids)
        for side, (completion, mask) in enumerate(completions_of(pair)):
            stop = start + len(completion)
            tokens[index, side, :start] = pair.prompt_ids
            tokens[index, side, start:stop] = completion
            attention_mask[index, side, :stop] = True
            completion_mask[index, side, start:stop] = mask
    # Attention over nothing is NaN, and NaN times weight 0 is still NaN.
    attention_mask[len(pairs) :, :, 0] = True
    return PreferenceBatch(tokens, attention_mask, completion_mask, None, _weights(len(pairs), num_slots))


def collate_completions(
    rows: Sequence[TokenizedCompletion], *, num_slots: int, length: int, pad_token_id: int
) -> CompletionBatch:
    """Lays out supervised examples as a right-padded batch, tokens int32 [num_slots, length]."""
    assert len(rows) <= num_slots, (len(rows), num_slots)
    tokens = np.full((num_slots, length), pad_token_id, np.int32)
    attention_mask = np.zeros((num_slots, length), bool)
    completion_mask = np.zeros((num_slots, length), bool)
    for index, row in enumerate(rows):
        stop = len(row.tokens)
        tokens[index, :stop] = row.tokens
        attention_mask[index, :stop] = True
        completion_mask[index, :stop] = row.completion_mask
    # As for pairs: attention over nothing would be NaN.
    attention_mask[len(rows) :, 0] = True
    return CompletionBatch(tokens, attention_mask, completion_mask, _weights(len(rows), num_slots))


def _weights(num_real: int, num_slots: int) -> np.ndarray:
    return (np.arange(num_slots) < num_real).astype(np.float32)  # [num_slots]


def prefetch(
    make: Callable[[int], T], steps: range, depth: int = 2, before_waiting: Callable[[], object] = lambda: None
) -> Generator[T, None, None]:
    """Yields `make(step)` for each step, computed up to `depth` ahead on a background thread.

    An exception of `make` is raised at its step. Closing the iterator stops the thread.

    Args:
      before_waiting: called where the next result is not there yet.
    """
    assert depth >= 1, depth
    # One thread, so that batches are made in their order.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="jdpo-prefetch") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > depth:
                    yield _awaited(pending.popleft(), before_waiting)
            while pending:
                yield _awaited(pending.popleft(), before_waiting)
        finally:
            # Only work that has not started can be cancelled; leaving the block waits for the rest.
            for future in pending:
                future.cancel()


def _awaited(future: Future[T], before_waiting: Callable[[], object]) -> T:
    if not future.done():
        before_waiting()
    return future.result()
