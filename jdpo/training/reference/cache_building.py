"""Computes the missing shards of a cache of reference log-probs, over the mesh, all processes together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jdpo.data.reference_cache.scores import CacheFolder, Shards
from jdpo.processes import PROGRESS, any_process, barrier, gathered, is_first, sharers_of
from jdpo.training.reference.cache_entries import RowSet, entry_of
from jdpo.training.reference.packed_scoring import PackedScorer, score_pairs
from jdpo.training.setup.run_setup import Log, Setup
from jdpo.words import figure

PROGRESS_SECONDS = 10.0
LOCK_POLL_SECONDS = 2.0


def build_cache(setup: Setup, rows: RowSet, scorer: PackedScorer, *, log: Log, repair: bool) -> int:
    """Computes the missing shards, all processes together, and returns how many rows they have.

    Args:
      repair: True computes damaged shards again, False refuses them.

    Raises:
      ValueError: the cache cannot be written, or is damaged and `repair` is False.
    """
    folder = rows.folder
    with _writing(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
    # Only one run computes an entry; others wait and then find it.
    with _alone(folder, scorer.check_stopped, log) as sharers:
        shards = folder.examine()  # again: another run may have written shards while this one waited
        if not repair:
            folder.refuse_damaged(shards)
        rank = sharers.index(jax.process_index())
        if rank == 0:
            entry = None if folder.has_entry() else entry_of(setup, rows)
            with _writing(folder):
                folder.clear_unfinished()
                if entry is not None:
                    folder.write_entry(entry)
        # All processes compute all missing shards, as the reference is split over their devices.
        # Nothing is written before every process has looked. What one of those that share a folder sees is there.
        whole = np.asarray(gathered(shards.whole)[list(sharers)].any(axis=0))
        todo = np.asarray(gathered(~whole).any(axis=0))
        progress = _Progress(rows, shards, folder.count_rows(todo), log)
        if todo.any():  # another run may have computed all of it in the meantime
            # All shards are planned, so that shapes, and with them the last bits, do not depend on what is missing.
            plan = scorer.plan(rows.data, rows.data.sizes(), [folder.rows_of(shard) for shard in range(len(todo))])
            for shard in map(int, np.flatnonzero(todo)):
                values = score_pairs(scorer, plan, folder.rows_of(shard), progress)
                # Each shard is written once per file system, by processes in turn.
                # Another run has written it meanwhile where locks have no effect, and may have opened it.
                if not whole[shard] and shard % len(sharers) == rank and not folder.is_whole(shard):
                    with _writing(folder):
                        folder.write_shard(shard, values)
        barrier("reference cached")
        return folder.count_rows(todo)


@contextlib.contextmanager
def _writing(folder: CacheFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot keep the reference's log-probs in {folder.path}: {error.strerror or error}; set cache_dir to a "
            "folder on a writable disk with free space, or reference to live"
        ) from error


class _Progress:
    """Logs every few seconds how far a computation is."""

    def __init__(self, rows: RowSet, shards: Shards, num_rows: int, log: Log) -> None:
        self._role, self._num_rows, self._done, self._log = rows.role, num_rows, 0, log
        self._due = time.monotonic() + PROGRESS_SECONDS
        damaged = f", {int(shards.damaged.sum())} damaged" if shards.damaged_files else ""
        if num_rows:
            log(
                f"reference: {num_rows} of {figure(rows.folder.num_rows, f'{rows.role} row')} to compute "
                f"(shards: {int(shards.whole.sum())} found{damaged}, {int(shards.missing.sum())} missing)"
            )

    def __call__(self, num_rows: int) -> None:
        self._done += num_rows
        PROGRESS.made("reference")
        if time.monotonic() >= self._due or self._done == self._num_rows:
            self._due = time.monotonic() + PROGRESS_SECONDS
            self._log(f"reference: {self._done} of {figure(self._num_rows, f'{self._role} row')} computed")


# --- several processes


@contextlib.contextmanager
def _alone(folder: CacheFolder, check_stopped: Callable[[], None], log: Log) -> Iterator[tuple[int, ...]]:
    """Waits until no other run computes the entry; yields the processes that share the folder with this one."""
    sharers = sharers_of(folder.path)
    lock, logged = None, False
    while True:
        with _writing(folder):
            # The first process locks for the whole run: if each did, they would wait for one another.
            lock = folder.try_lock() if is_first() else None
        if not any_process(is_first() and lock is None):
            break
        if not logged:
            log(f"reference: waiting for another run that computes {folder.path}")
            logged = True
        check_stopped()
        PROGRESS.made("reference")  # of the other run, whose own watchdog looks after it
        time.sleep(LOCK_POLL_SECONDS)
    try:
        yield sharers
    finally:
        if lock is not None:
            lock.close()
