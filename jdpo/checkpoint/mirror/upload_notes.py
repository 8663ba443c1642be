"""Notes in the run's folder, which all processes share: what is to be uploaded, and what each process has uploaded.

    .mirror/task.json           what the processes upload now; written by the first one
    .mirror/process-<i>.json    what process i has uploaded, with digests
    .mirror/known.json          what the mirror held when the run started, as far as it is known for certain

Processes exchange these files and no collective operations, so that uploads never wait for steps, nor steps for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.durable import write_durably

NOTES = ".mirror"

Digest = list[Any]
"""The bytes and the SHA-256 of a file, as in manifests; the latter is None where it is not known yet."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One folder that the processes upload together.

    Attributes:
      number: counts the tasks of a start.
      folder: name of the folder; empty if there is nothing to do.
      files: name of each file, relative to the folder -> its bytes and digest.
      again: True to upload also what was uploaded before.
      over: True if the uploads of this start have ended.
    """

    number: int
    folder: str = ""
    files: Mapping[str, Digest] = dataclasses.field(default_factory=dict)
    again: bool = False
    over: bool = False


class Progress(NamedTuple):
    """The progress of a process with a task.

    Attributes:
      done: name of each object that it has uploaded -> bytes and digest.
      over: True if it does no more for the task.
      problem: why the last attempt failed; None if it did not.
      given_up: why no attempt can succeed; None otherwise.
    """

    done: Mapping[str, Digest] = {}
    over: bool = False
    problem: str | None = None
    given_up: str | None = None


class UploadNotes:
    """The notes of one process, and those of the others."""

    def __init__(self, run: Path, index: int, start: int) -> None:
        """
        Args:
          run: the folder of the run.
          index: of this process.
          start: a number that all processes of this start have, and no other start: a network file system may show the
            notes of an earlier one for a while.
        """
        self._start = start
        self._folder = run / NOTES
        self._own = self._folder / f"process-{index}.json"
        self._lock = threading.Lock()  # several files are uploaded at a time
        self._known: dict[str, Digest] = {}
        self._address = ""
        self._task = Task(-1)
        self._progress = Progress()

    # --- at the start

    def begin(self, address: str, listed: Mapping[str, int]) -> None:
        """Merges what earlier starts have uploaded to this mirror into known.json. To be called by the first process.

        Args:
          listed: {name: bytes} of the objects in the mirror; what has another size now is not known.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        known: dict[str, Digest] = {}
        paths = [self._folder / "known.json", *sorted(self._folder.glob("process-*.json"))]
        for notes in map(_read, paths):
            if notes.get("mirror") == address:
                known |= {name: found for name, found in notes.get("done", {}).items() if listed.get(name) == found[0]}
        write_durably(paths[0], json.dumps({"mirror": address, "done": known}))
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        self.publish(Task(0))

    def join(self, address: str) -> None:
        """Takes over what is known at the start. Every process must call this, after `begin`."""
        self._address = address
        self._known = dict(_read(self._folder / "known.json").get("done", {}))

    # --- tasks

    def publish(self, task: Task) -> None:
        """Gives all processes a task. To be called by the first process."""
        write_durably(self._folder / "task.json", json.dumps({"start": self._start, **dataclasses.asdict(task)}))

    def task(self) -> Task:
        """Returns the current task."""
        found = _read(self._folder / "task.json")
        return Task(**found) if found.pop("start", None) == self._start else Task(-1)

    def start(self, task: Task) -> None:
        """Begins a task on this process; what it has uploaded of the same folder before need not be uploaded again."""
        if task.again:
            self._known = {name: found for name, found in self._known.items() if not _is_in(name, task.folder)}
        keeps = task.folder == self._task.folder and not task.again
        self._task = task
        self._note(Progress(self._progress.done if keeps else {}))

    def is_uploaded(self, name: str, digest: Digest) -> bool:
        """Returns True if an object is known to hold just this."""
        return digest in (self._known.get(name), self._progress.done.get(name))

    def uploaded(self, name: str, digest: Digest) -> None:
        """Notes what an object holds now."""
        with self._lock:
            self._note(self._progress._replace(done={**self._progress.done, name: digest}))

    def failed(self, problem: str) -> None:
        """Notes why an attempt of this process failed; it tries again."""
        self._note(self._progress._replace(problem=problem))

    def finish(self, given_up: str | None = None) -> None:
        """Notes that this process has uploaded its share, or why it never can."""
        self._note(self._progress._replace(over=True, given_up=given_up))

    def progress(self, task: Task, count: int) -> list[Progress]:
        """Returns the progress of each process with a task."""
        found = [_read(self._folder / f"process-{index}.json") for index in range(count)]
        return [
            Progress(**{name: notes[name] for name in Progress._fields})
            if (notes.get("start"), notes.get("task")) == (self._start, task.number)
            else Progress()
            for notes in found
        ]

    def _note(self, progress: Progress) -> None:
        self._progress = progress
        notes = {"mirror": self._address, "start": self._start, "task": self._task.number, **progress._asdict()}
        write_durably(self._own, json.dumps(notes))


def _is_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}
