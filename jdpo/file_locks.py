"""Locks that keep two processes of one machine (or of one network file system) from writing the same files."""

from __future__ import annotations

from pathlib import Path
from typing import IO


def lock_file(path: Path, *, wait: bool = False) -> IO[str] | None:
    """Opens a file, creates it if it is missing, and locks it until it is closed.

    The operating system releases the lock when the process ends, however it ends, so a lock never outlives its owner.
    A file system without locks is no reason to fail: there the file is returned without a lock.

    Args:
      path: the file, in a folder that exists.
      wait: wait until other processes have closed the file.

    Returns:
      The file, open for reading and appending; None if another process has locked it and `wait` is false.

    Raises:
      OSError: the file cannot be opened.
    """
    import fcntl  # missing on Windows, where everything else of jdpo can be imported

    # "a" keeps the content, which names the owner, until the lock is held.
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except OSError:  # a file system without locks
        pass
    return lock
