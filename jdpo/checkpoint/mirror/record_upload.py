"""Uploads the records of a run, such as run.json and metrics.jsonl, as they are at the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from jdpo.checkpoint.mirror.contents import record_files
from jdpo.checkpoint.mirror.object_store import ObjectStore

_AT_ONCE_BYTES = 2**26
"""Files up to this size are read at one moment, so that a line that is being written is in it or not."""


class RecordUpload:
    """Uploads the records of a run that have changed since they were last uploaded."""

    def __init__(self, store: ObjectStore, run: Path) -> None:
        self._store, self._run = store, run
        self._states: dict[str, tuple[int, int]] = {}

    def upload(self, names: Sequence[str] | None = None) -> None:
        """Uploads files that have changed.

        Args:
          names: files that exist; None: all records.

        Raises:
          StoreError: the store refused one.
        """
        for name in record_files(self._run) if names is None else names:
            path = self._run / name
            with contextlib.suppress(FileNotFoundError):  # pages and plots are replaced while a run goes on
                found = path.stat()
                state = (found.st_size, found.st_mtime_ns)
                if self._states.get(name) == state:
                    continue
                if found.st_size > _AT_ONCE_BYTES:
                    self._store.upload(path, name)
                else:
                    self._store.write(name, path.read_bytes())
                self._states[name] = state
