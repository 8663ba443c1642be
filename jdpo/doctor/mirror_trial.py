"""The trial of the mirror of a run: every process writes an object, and reads it and that of process 0."""

from __future__ import annotations

import time
from collections.abc import Iterable

from jdpo.checkpoint.mirror.object_store import ObjectStore
from jdpo.config import public_text


class MirrorTrial:
    """A trial of an object store by one process; see `jdpo.doctor.folder_trial.Trial`."""

    def __init__(self, url: str, *, token: str, process: int) -> None:
        self.address = public_text(url)
        self._url, self._token, self._process = url, token, process

    def write(self) -> float:
        """Writes the object of this process and reads it back; returns the seconds that this took.

        Raises:
          ValueError: the package for this kind of store is missing.
          OSError: the store refuses it, or the content that is read is another one.
        """
        begin = time.monotonic()
        store = ObjectStore(self._url)
        store.write(self._name(self._process), self._content(self._process))
        if store.read(self._name(self._process)) != self._content(self._process):
            raise OSError(f"{self.address}: the content that was read is not what was written")
        return time.monotonic() - begin

    def read_others(self, processes: Iterable[int]) -> tuple[int, ...]:
        """Returns all processes if the object of process 0 is there, else this process alone."""
        # Objects of all by all would be many requests, and a store is one place for everybody or for nobody.
        found = ObjectStore(self._url).read(self._name(0))
        return tuple(processes) if found == self._content(0) else (self._process,)

    def place(self) -> tuple[str, str, int | None]:
        """Returns what is known of the store, as that of a folder."""
        return "", "object store", None

    def remove_file(self) -> None:
        """Removes the object of this process."""
        ObjectStore(self._url).delete(self._name(self._process))

    def remove_folders(self) -> None:
        """Does nothing: object stores have no folders."""

    def _name(self, process: int) -> str:
        return f".jdpo-doctor-{self._token}-{process}"

    def _content(self, process: int) -> bytes:
        return f"process {process} of {self._token}".encode()
