"""A file per tracker with the id of the run there and the newest step that was sent, so that no restart sends it again.

metrics.jsonl is cut to the checkpoint that a run continues from; what a tracker has stored cannot be cut. So the steps
that are made a second time are not sent a second time, and lines that never reached the tracker are.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jdpo.durable import write_durably
from jdpo.json_files import read_json


class SentSteps:
    """The record of what one tracker was sent in the life of a run.

    Attributes:
      id: of the run in this tracker.
      resumed: True if an earlier start of the run has used this tracker.
    """

    def __init__(self, path: Path, project: str, *, new: bool) -> None:
        """
        Args:
          path: the file.
          project: of the run in the tracker; in another project there is nothing to continue.
          new: True: the run starts now, and the file, if there is one, is that of another run.

        Raises:
          ValueError: the file is damaged.
        """
        self._path, self._project = path, project
        found = None if new or not path.exists() else _read(path)
        if found is None or found["project"] != project:
            self.start_new()
            return
        self.id, self.resumed = found["id"], True
        self._step: int = found["step"]
        self._names: frozenset[str] | None = None if found["sent"] is None else frozenset(found["sent"])

    def start_new(self) -> None:
        """Begins a run that the tracker does not know yet."""
        self.id, self.resumed = uuid.uuid4().hex[:8], False
        self._step, self._names = -1, frozenset()
        # Before the tracker has the id, so that a run that is killed in between continues under the same one.
        self._write()

    def correct(self, newest_step: int) -> None:
        """Takes the newest step that the tracker itself says it has, all of it."""
        if newest_step != self._step:
            self._step, self._names = newest_step, None
            self._write()

    def missing(self, step: int, names: Iterable[str]) -> list[str]:
        """Returns the names of the values of a step that were not sent yet.

        Steps come in order. Several lines may belong to one step, and a run may be killed between two of them.
        """
        if step < self._step:
            return []
        if step > self._step:
            return list(names)
        return [] if self._names is None else [name for name in names if name not in self._names]

    @contextlib.contextmanager
    def sending(self, step: int, names: Iterable[str]) -> Iterator[None]:
        """While entered, values are being sent. If that raises, they count as not sent.

        They are written down before they are sent: after a kill in between they are missing in the tracker, and not
        there twice.
        """
        before = self._step, self._names
        earlier = self._names if step == self._step else None
        self._step, self._names = step, frozenset(names) | (earlier or frozenset())
        self._write()
        try:
            yield
        except BaseException:
            self._step, self._names = before
            self._write()
            raise

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        names = None if self._names is None else sorted(self._names)
        values = {"id": self.id, "project": self._project, "step": self._step, "sent": names}
        write_durably(self._path, json.dumps(values) + "\n")


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    kinds = {"id": str, "project": str, "step": int, "sent": list | None}
    fits = all(isinstance(values.get(name), kind) for name, kind in kinds.items())
    # An id becomes part of names of files and of queries.
    if not fits or not re.fullmatch("[0-9a-f]+", values["id"]):
        raise ValueError(f"{path} was not written by jdpo; remove it, and the tracker gets the whole run as a new one")
    return values
