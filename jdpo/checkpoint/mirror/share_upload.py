"""The uploads of one process: its share of each task, tried again until it succeeds or another task comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jdpo.checkpoint.mirror.contents import share_of
from jdpo.checkpoint.mirror.daemon_threads import in_daemon_threads
from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.mirror.upload_notes import Digest, Task, UploadNotes
from jdpo.file_digests import file_digest

AT_ONCE = 4
"""Files that a process copies at a time."""

LAST_ATTEMPTS = 5
"""Attempts in a row that fail before a run that has ended gives up."""

POLL_SECONDS = 0.5
"""Between two looks at the notes of the other processes."""


class CannotUpload(Exception):
    """A file on the disk is gone, or is not what its manifest says; no attempt can succeed."""


class Backoff:
    """The pauses between attempts.

    Attributes:
      failures: attempts in a row that failed.
    """

    def __init__(self) -> None:
        self.failures = 0

    def seconds(self) -> float:
        """Returns the pause before the next attempt: 1 second, then twice as long each time, up to a minute."""
        return min(60.0, 2.0 ** (self.failures - 1))

    def clear(self) -> None:
        """Forgets the failures, after a success."""
        self.failures = 0


def upload_share(
    store: ObjectStore,
    run: Path,
    notes: UploadNotes,
    task: Task,
    index: int,
    count: int,
    given_up: Callable[[], bool],
) -> None:
    """Uploads the files of a task that are this process's share and that the mirror does not hold yet.

    Args:
      given_up: returns True if the uploads of this start have been given up.

    Raises:
      CannotUpload: a file is gone or damaged.
      StoreError: the store refused a file, and the others have been tried; or the uploads were given up.
    """

    def upload(name: str) -> None:
        size, expected = task.files[name]
        path, target = run / task.folder / name, f"{task.folder}/{name}"
        try:
            # A checkpoint of an earlier start may have been damaged since; the mirror must not get it.
            digest: Digest = [path.stat().st_size, file_digest(path)]
            if digest[0] != size or expected not in (None, digest[1]):
                raise CannotUpload(f"{path} is not the file that was written")
            if not notes.is_uploaded(target, digest):
                store.upload(path, target)
            notes.uploaded(target, digest)
        except FileNotFoundError as error:
            raise CannotUpload(f"{path} is gone") from error

    share = share_of({name: found[0] for name, found in task.files.items()}, index, count)
    # One refused file must not keep the others from being there when it is tried again.
    errors = in_daemon_threads(upload, share, AT_ONCE, given_up)
    for error in sorted(errors, key=lambda error: isinstance(error, StoreError)):
        raise error


class Follower:
    """The thread of a process other than the first: it uploads its share of what the first one asks for."""

    def __init__(self, store: ObjectStore, run: Path, notes: UploadNotes, index: int, count: int) -> None:
        self._store, self._run, self._notes, self._index, self._count = store, run, notes, index, count
        self._leaving = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def close(self, given_up: Callable[[], bool]) -> None:
        """Waits until the first process has ended the uploads.

        Args:
          given_up: returns True to wait no longer.
        """
        self._ending = True
        while self._thread.is_alive() and not given_up():
            self._thread.join(POLL_SECONDS)
        self._leaving.set()

    def _follow(self) -> None:
        number, backoff, due = -1, Backoff(), math.inf
        while not self._leaving.wait(POLL_SECONDS):
            task = self._notes.task()
            if task.over:
                return
            if task.number != number:
                number, due = task.number, math.inf
                backoff.clear()
                if task.folder:
                    self._notes.start(task)
                    due = 0.0
            if time.monotonic() >= due:
                due = math.inf if self._attempt(task, backoff) else time.monotonic() + backoff.seconds()

    def _attempt(self, task: Task, backoff: Backoff) -> bool:
        """Tries to upload the share; returns True if no further attempt is to be made."""
        try:
            upload_share(self._store, self._run, self._notes, task, self._index, self._count, self._leaving.is_set)
        except CannotUpload as error:
            self._notes.finish(str(error))
        except OSError as error:  # of the store, or of the disk
            backoff.failures += 1
            if not self._ending or backoff.failures < LAST_ATTEMPTS:
                self._notes.failed(str(error))
                return False
            self._notes.finish(str(error))
        else:
            self._notes.finish()
        return True
