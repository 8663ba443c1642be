"""Tokenizes the rows of a run; processes that share a cache share the work."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from jdpo.config import DatasetConfig, DataSettings
from jdpo.data.prepared.chunk_stream import Share
from jdpo.data.prepared.held_out import Part
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.prepared.token_entry import Progress, TokenEntry, WrittenShare
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.processes import (
    PROGRESS,
    any_process,
    differing,
    gathered,
    run_jointly,
    seen_soon,
    sharers_of,
    text_of_first,
)
from jdpo.reports.progress import RowCounter
from jdpo.training.setup.row_order import BuildStopped, Log, preparation_of, sides_of

T = TypeVar("T")


def prepare_rows(
    settings: DataSettings,
    tokenizer: Tokenizer,
    log: Log,
    *,
    pairs: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[PreparedData, PreparedData | None]:
    """Tokenizes the training rows and, if there are any, the evaluation rows, and logs a summary of each.

    Every process must call this. Those that see each other's files in the cache tokenize a share of the rows each.

    Args:
      pairs: True for pairs, False for completions.
      log: takes lines for the user.
      stopped: returns True if a signal asks to stop; called while rows are tokenized.

    Raises:
      ValueError: rows cannot be read, or no row is left.
      BuildStopped: `stopped` returned True on any process.
    """
    find = preparation_of(settings, pairs=pairs)

    def prepare(datasets: Sequence[DatasetConfig], part: Part | None, title: str) -> PreparedData:
        entry = run_jointly(lambda: find(datasets, tokenizer, part=part))
        data = _load(entry, partial(_progress, RowCounter(log), stopped))
        # The first thing to look at when a run trains on other rows than expected.
        log(f"{title}{data.summary()}\n  {data.cache_note}")
        return data

    training, evaluation = sides_of(settings)
    return prepare(*training, ""), evaluation and prepare(*evaluation, "evaluation ")


def _progress(counter: RowCounter, stopped: Callable[[], bool], num_rows: int, total: int | None) -> None:
    counter(num_rows, total)
    PROGRESS.made("data", alike=False)
    if stopped():
        raise BuildStopped


def _load(entry: TokenEntry, progress: Progress) -> PreparedData:
    """Returns the rows of an entry, tokenized if they are not in the cache of this process."""
    data = run_jointly(entry.open)
    # Everybody takes part in what follows, also those that have their rows: none may wait for one that is not coming.
    if not any_process(data is None):
        assert data is not None
        return data
    # Other keys mean other files on some host, which `check_inputs` names once the rows are known.
    sharers = sharers_of(entry.folder) if not differing({"key": entry.key}) else _alone()
    # Finding out has changed the folder, so that this process sees what others have put there long ago.
    data = run_jointly(lambda: entry.open() if data is None else data)
    having = gathered(np.array(data is not None)).reshape(-1)
    # One that sees the same folder has the rows there, so they are there: this process only does not see them yet.
    if data is None and any(having[process] for process in sharers):
        data = seen_soon(entry.open, entry.folder)
    lacking = gathered(np.array(data is None)).reshape(-1)
    # Members of a group answer alike, unless the file was damaged on the way to one of them.
    together = len(sharers) > 1 and all(lacking[process] for process in sharers)
    return _tokenized(entry, data, sharers if together else _alone(), progress)


def _alone() -> tuple[int, ...]:
    return (jax.process_index(),)


def _tokenized(
    entry: TokenEntry, data: PreparedData | None, sharers: tuple[int, ...], progress: Progress
) -> PreparedData:
    """Tokenizes what this process lacks.

    Args:
      data: the rows, if this process has them.
      sharers: the processes that tokenize a share each; this one alone, if it tokenizes everything or nothing.
    """
    rank, count = sharers.index(jax.process_index()), len(sharers)
    # A name that no process has looked up before, see `jdpo.processes.sharing`.
    place = entry.folder / f".new-{text_of_first(secrets.token_hex(8))}-{min(sharers)}"
    paths = [place / f"{process}.chunks" for process in sharers]

    def tokenize() -> PreparedData | WrittenShare:
        if data is not None:
            return data
        if count == 1:
            return entry.tokenize(progress)
        with contextlib.suppress(OSError):  # reported when the file cannot be written
            place.mkdir(parents=True, exist_ok=True)
        return entry.write_share(paths[rank], Share(rank, count), progress)

    try:
        found = _unless_stopped(tokenize)
        mine = (found.num_chunks, found.num_chunks_of_all) if isinstance(found, WrittenShare) else (0, 0)
        lengths = gathered(np.array(mine, np.int32)).tolist()
        shares = [WrittenShare(path, *lengths[process]) for path, process in zip(paths, sharers, strict=True)]
        joined = _unless_stopped(lambda: entry.join(shares, progress) if count > 1 and rank == 0 else None)

        def see() -> PreparedData:
            if isinstance(found, PreparedData):
                return found
            # The others may have looked for the entry before it was there.
            return joined or seen_soon(partial(entry.open, from_cache=False), entry.folder) or entry.written()

        return run_jointly(see)
    finally:
        with contextlib.suppress(OSError):
            paths[rank].unlink(missing_ok=True)
            place.rmdir()  # the last one succeeds


def _unless_stopped(work: Callable[[], T]) -> T:
    """Calls `work` on every process, as `run_jointly` does.

    Raises:
      BuildStopped: a signal ended the work of any process; the others have finished theirs.
    """

    def caught() -> T | BuildStopped:
        try:
            return work()
        except BuildStopped as stopped:  # no failure: the others may have heard of the signal later, or not at all
            return stopped
        finally:
            PROGRESS.made("data")  # so that those that wait are seen to be further than one that is stuck

    found = run_jointly(caught)
    if any_process(isinstance(found, BuildStopped)) or isinstance(found, BuildStopped):
        raise BuildStopped
    return found
