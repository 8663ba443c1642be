"""Locks that keep two processes of one machine (or of one network file system) from writing the same files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

_BETWEEN_ATTEMPTS = 0.05


def lock_file(path: Path, *, wait: bool = False, patience: float = 0.0) -> IO[str] | None:
    """Opens a file, creates it if it is missing, and locks it until it is closed.

    The operating system releases the lock when the process ends, however it ends, so a lock never outlives its owner.
    A file system without locks is no reason to fail: there the file is returned without a lock.

    Args:
      path: the file, in a folder that exists.
      wait: wait until other processes have closed the file.
      patience: seconds to try again if `wait` is false, so that an instant in which `is_locked` looks is no refusal.

    Returns:
      The file, open for reading and appending; None if another process has locked it and `wait` is false.

    Raises:
      OSError: the file cannot be opened.
    """
    import fcntl  # missing on Windows, where everything else of jdpo can be imported

    # "a" keeps the content, which names the owner, until the lock is held.
    lock = path.open("a+", encoding="utf-8")
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(_BETWEEN_ATTEMPTS)
                continue
            lock.close()
            return None
        except OSError:  # a file system without locks
            pass
        return lock


def is_locked(path: Path) -> bool:
    """Returns True if a process has locked the file with `lock_file`; False as well if that cannot be known.

    Does not write, and lets any number of processes look at the same time. For an instant it keeps others from locking
    the file, so these need a little patience.
    """
    import fcntl

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, no right to read it, or a file system without locks
        pass
    return False
