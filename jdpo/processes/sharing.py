"""Which processes of a run see the same folder, and how one sees there what another has written.

A client of a network file system may answer from memory for up to a minute: a name that it has looked up in vain stays
absent, and a listing stays as it was. A name that it has never looked up is asked of the server. So files are found by
names that no process has looked up before, never by listing; and what other processes have put in place under a known
name is looked for again and again, after a change to the folder, which makes the client ask the server.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from jdpo.processes.agreement import barrier, gathered
from jdpo.processes.process_progress import PROGRESS

T = TypeVar("T")

STALE_SECONDS = 90.0
"""The time that a client may take to see a file that is there: NFS and SMB answer from memory for 60 s at most."""

_MARK_SECONDS = 1.0
_BETWEEN = 0.1
_LONGEST_BETWEEN = 5.0


def sharers_of(folder: Path) -> tuple[int, ...]:
    """Returns the processes, this one included, that see what each other write to a folder, in ascending order.

    Every process must call this; the folder may be another one on each. It is created if it is missing. A process that
    cannot write to it shares it with nobody. All members of a group get the same answer.
    """
    me = jax.process_index()
    if jax.process_count() == 1:
        return (me,)
    # Numbers of this call alone: neither files of a killed start nor names that were looked up before are met.
    tokens = gathered(np.array([secrets.randbits(31)], np.int32))[:, 0].tolist()
    run = tokens[0]
    marks = [folder / f".process-{run}-{process}" for process in range(len(tokens))]
    with contextlib.suppress(OSError):  # another process may be able to
        folder.mkdir(parents=True, exist_ok=True)
        marks[me].write_text(str(tokens[me]), encoding="ascii")
    # All files are there before any process looks, and all have looked before any is removed.
    barrier("folder marked")
    seen = np.zeros(len(tokens), bool)
    end = time.monotonic() + _MARK_SECONDS
    while not seen.all():
        seen = np.array([_holds(mark, str(token)) for mark, token in zip(marks, tokens, strict=True)])
        if seen.all() or not seen[me] or time.monotonic() > end:
            break
        ask_server(folder)
        time.sleep(_BETWEEN)
    views = gathered(seen)  # [processes, processes]
    with contextlib.suppress(OSError):
        marks[me].unlink(missing_ok=True)
    return group_of(views, me)


def group_of(views: np.ndarray, me: int) -> tuple[int, ...]:
    """Returns the processes that see the same ones as this one, if these are the very ones; else this one alone.

    Args:
      views: bool [processes, processes]; the first process sees files of the second.

    >>> views = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    >>> [group_of(views, process) for process in range(3)]
    [(0, 1), (0, 1), (2,)]
    >>> views[1, 0] = False
    >>> group_of(views, 0)
    (0,)
    """
    alike = [int(process) for process in np.flatnonzero(views[me])]
    # Where some see others that do not see them, work that is shared out could be left undone.
    consistent = me in alike and all(np.array_equal(views[process], views[me]) for process in alike)
    return tuple(alike) if consistent else (me,)


def seen_soon(look: Callable[[], T | None], folder: Path, *, patience: float = STALE_SECONDS) -> T | None:
    """Looks for what another process has put in place, until this process sees it; returns None if it never does.

    Args:
      look: returns what is found, or None.
      folder: the folder in which it is.
      patience: seconds.
    """
    end, pause = time.monotonic() + patience, _BETWEEN
    while (found := look()) is None and time.monotonic() < end:
        PROGRESS.made(PROGRESS.phase, alike=False)
        ask_server(folder)
        time.sleep(min(pause, max(end - time.monotonic(), 0)))
        pause = min(2 * pause, _LONGEST_BETWEEN)
    return found


def ask_server(folder: Path) -> None:
    """Changes a folder: a client that has changed it does not answer from memory what it contains."""
    probe = folder / f".look-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):  # a folder that is only read cannot be changed; time will pass
        probe.touch()
        probe.unlink()


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == content
    except (OSError, ValueError):
        return False
