"""Computing a cache of reference log-probs: what is missing, over the mesh, all processes together.

Axes: b pairs, n=2 sides (chosen, rejected), t token positions.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jdpo.data.loader import bucket_length, collate_pairs
from jdpo.data.prepare import PreparedData
from jdpo.data.reference_cache import CacheFolder, RowLogps, Shards
from jdpo.losses.objective import pair_token_logps
from jdpo.models.transformer import Transformer, abstract_params, logical_axes, make_apply_fn
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.sharding.rules import param_shardings
from jdpo.training.processes import any_process, barrier, is_first
from jdpo.training.reference_rows import RowSet, entry_of
from jdpo.training.setup import Say, Setup, load_reference
from jdpo.training.step import on_mesh
from jdpo.types import PreferenceBatch, TokenizedPair

Array = Any
Params = Any

PROGRESS_SECONDS = 10.0
LOCK_POLL_SECONDS = 2.0


class BuildStopped(Exception):
    """A signal asked the run to stop while it computed the cache; the shards written so far stay."""


def build_cache(setup: Setup, rows: RowSet, scorer: Scorer, *, say: Say, repair: bool) -> int:
    """Computes the shards that are not there, all processes together, and returns how many rows they have.

    Args:
      repair: whether damaged shards are computed anew instead of refused.

    Raises:
      ValueError: the cache cannot be written, or is damaged and not to be repaired.
    """
    folder = rows.folder
    with _writing(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
    with _alone(folder, scorer.check_stopped, say) as (rank, num_sharers):
        shards = folder.examine()  # again: another run may have been at work until now
        if not repair:
            folder.refuse_damaged(shards)
        if rank == 0:
            entry = None if folder.has_entry() else entry_of(setup, rows)
            with _writing(folder):
                folder.clear_unfinished()
                if entry is not None:
                    folder.write_entry(entry)
        todo = _union(~shards.whole)  # nothing is written before every process has looked
        progress = _Progress(rows, shards, folder.count_rows(todo), say)
        for shard in map(int, np.flatnonzero(todo)):
            values = scorer.score(rows.data, folder.rows_of(shard), progress)
            if not shards.whole[shard] and shard % num_sharers == rank:
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
            "folder on a writable disk with room, or reference to live"
        ) from error


class Scorer:
    """The frozen reference on the mesh, loaded when the first row is scored and freed with this object."""

    def __init__(self, setup: Setup, stopped: Callable[[], bool]) -> None:
        self._setup, self._stopped = setup, stopped
        self._num_slots = setup.layout.rows_per_micro

    def check_stopped(self) -> None:
        """
        Raises:
          BuildStopped: a signal asks for it.
        """
        if self._stopped():
            raise BuildStopped

    def score(self, data: PreparedData, rows: range, progress: Callable[[int], None]) -> list[RowLogps]:
        """The log-probs of the completion tokens of each row.

        Rows go through in order of length, longest first: little padding, few shapes, and what does not fit into
        memory shows at once.

        Args:
          progress: told after each batch how many rows it had.

        Raises:
          FloatingPointError: one is not finite; its row is named.
        """
        order = np.argsort(-data.lengths[rows.start : rows.stop], kind="stable") + rows.start
        batches = [order[start : start + self._num_slots] for start in range(0, len(order), self._num_slots)]
        scored: dict[int, RowLogps] = {}
        under_way: deque[tuple[np.ndarray, list[TokenizedPair], Array]] = deque()

        def take() -> None:
            indices, pairs, on_device = under_way.popleft()
            scored.update(zip(map(int, indices), _rows_of(fetch(on_device), pairs), strict=True))
            progress(len(indices))

        for indices in batches:
            self.check_stopped()
            pairs = [data[int(index)] for index in indices]
            length = bucket_length(int(data.lengths[indices].max()), self._setup.config.max_length)
            under_way.append((indices, pairs, self._launch(pairs, length)))
            if len(under_way) > 1:  # the device works on a batch while the host is at the one before
                take()
        while under_way:
            take()
        return [scored[row] for row in rows]

    def _launch(self, pairs: Sequence[TokenizedPair], length: int) -> Array:
        batch = collate_pairs(
            pairs, num_slots=self._num_slots, length=length, pad_token_id=self._setup.tokenizer.pad_token_id
        )
        micro = jax.tree.map(lambda array: array[None], batch)
        token_logps = _compiled(self._setup.model, self._setup.mesh)
        return token_logps(self._params, place(micro, micro_batch_sharding(self._setup.mesh)))

    @functools.cached_property
    def _params(self) -> Params:
        return load_reference(self._setup, None)


@functools.lru_cache(maxsize=2)
def _compiled(model: Transformer, mesh: Mesh) -> Callable[[Params, PreferenceBatch], Array]:
    """(params, batch [1, b, ...]) -> [b, 2, t], laid out over the mesh as a step's micro-batch is; jitted."""
    apply_fn = make_apply_fn(model)

    def token_logps(params: Params, batch: PreferenceBatch) -> Array:
        return pair_token_logps(params, jax.tree.map(lambda array: array[0], batch), apply_fn=apply_fn)

    jitted = jax.jit(
        token_logps,
        in_shardings=(
            param_shardings(logical_axes(model), abstract_params(model), mesh),
            micro_batch_sharding(mesh),
        ),
        out_shardings=replicated(mesh),
    )

    return on_mesh(mesh, jitted)


def _rows_of(logps: np.ndarray, pairs: Sequence[TokenizedPair]) -> list[RowLogps]:
    """[b, 2, t] of a batch as the values of each completion."""
    rows = []
    for pair, (chosen, rejected) in zip(pairs, logps, strict=False):  # behind the pairs stands padding
        start = len(pair.prompt_ids)
        values = chosen[start : start + len(pair.chosen_ids)], rejected[start : start + len(pair.rejected_ids)]
        for side, name in zip(values, ("chosen", "rejected"), strict=True):
            if not np.isfinite(side).all():
                token = int(np.argmin(np.isfinite(side)))
                raise FloatingPointError(
                    f"the reference's log-prob of token {token} of the {name} completion of {pair.origin} is "
                    f"{side[token]}; is the reference model in order? Nothing of its shard was kept"
                )
        rows.append(values)
    return rows


class _Progress:
    """Says now and then how far a computation is."""

    def __init__(self, rows: RowSet, shards: Shards, num_rows: int, say: Say) -> None:
        self._role, self._num_rows, self._done, self._say = rows.role, num_rows, 0, say
        self._due = time.monotonic() + PROGRESS_SECONDS
        damaged = f", {int(shards.damaged.sum())} damaged" if shards.damaged_files else ""
        if num_rows:
            say(
                f"reference: {num_rows} of {rows.folder.num_rows} {rows.role} rows to compute "
                f"(shards: {int(shards.whole.sum())} found{damaged}, {int(shards.missing.sum())} missing)"
            )

    def __call__(self, num_rows: int) -> None:
        self._done += num_rows
        if time.monotonic() >= self._due or self._done == self._num_rows:
            self._due = time.monotonic() + PROGRESS_SECONDS
            self._say(f"reference: {self._done} of {self._num_rows} {self._role} rows computed")


# --- several processes


def _union(mine: np.ndarray) -> np.ndarray:
    """Where bool [n] is True on any process."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    union: np.ndarray = multihost_utils.process_allgather(mine).any(axis=0)
    return union


@contextlib.contextmanager
def _alone(folder: CacheFolder, check_stopped: Callable[[], None], say: Say) -> Iterator[tuple[int, int]]:
    """Waits until no other run computes the entry; gives this process's place among those that share the folder."""
    with _writing(folder):
        place_among = _sharers(folder)
    lock, told = None, False
    while True:
        with _writing(folder):
            lock = folder.try_lock() if is_first() else None
        if not any_process(is_first() and lock is None):
            break
        if not told:
            say(f"reference: waiting for another run that computes {folder.path}")
            told = True
        check_stopped()
        time.sleep(LOCK_POLL_SECONDS)
    try:
        yield place_among
    finally:
        if lock is not None:
            lock.close()


def _sharers(folder: CacheFolder) -> tuple[int, int]:
    """(rank, count) of this process among those that see the same folder: each leaves a file and looks for others'."""
    if jax.process_count() == 1:
        return 0, 1
    from jax.experimental import multihost_utils

    run = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    mine = folder.path / f".process-{run}-{jax.process_index()}"
    mine.touch()
    barrier("reference folder marked")
    seen = sorted(int(path.name.rpartition("-")[2]) for path in folder.path.glob(f".process-{run}-*"))
    barrier("reference folder seen")
    mine.unlink()
    return seen.index(jax.process_index()), len(seen)
