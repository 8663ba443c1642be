"""Where files lie: what a store of files does, and this machine's disk as one; `remote` has the others."""

from __future__ import annotations

import io
import os
import stat
from typing import Literal, NamedTuple, Protocol, cast

from jdpo.file_digests import cached_file_digest
from jdpo.safe_text import terminal

BUFFER_BYTES = 2**20

Kind = Literal["file", "folder", "other"]


class Entry(NamedTuple):
    """Something in a folder."""

    name: str
    path: str
    kind: Kind


class Store(Protocol):
    """Reads files and lists folders. Every error is a ValueError that names the path."""

    def place(self, path: str) -> str:
        """The path as messages name it."""

    def kind(self, path: str) -> Kind | None:
        """What is there; None: nothing."""

    def entries(self, folder: str) -> list[Entry]:
        """What is in a folder, by name."""

    def join(self, folder: str, name: str) -> str:
        """The path of something in a folder."""

    def open(self, path: str) -> io.BufferedReader:
        """The bytes of a file, from its start; several may be open at a time."""

    def checksum(self, path: str) -> str | None:
        """The store's own hash of a file's content, where it has one: it saves reading the file for its digest."""


class Disk:
    """The files of this machine."""

    def place(self, path: str) -> str:
        return terminal(path)

    def kind(self, path: str) -> Kind | None:
        """What is there, links followed.

        Raises:
          ValueError: a link leads nowhere, or the path may not be looked at.
        """
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(path):
                raise ValueError(
                    f"{self.place(path)}: broken symlink: its target {terminal(os.readlink(path))} does not exist; "
                    "mend the link, or bring its target back"
                ) from None
            return None
        except OSError as error:
            raise ValueError(f"{self.place(path)}: cannot read it: {error.strerror or error}") from error
        except ValueError:  # a NUL in the path
            return None
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    def entries(self, folder: str) -> list[Entry]:
        def kind(entry: os.DirEntry[str]) -> Kind:
            return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"

        try:
            with os.scandir(folder) as found:
                return sorted(Entry(entry.name, entry.path, kind(entry)) for entry in found)
        except OSError as error:
            raise ValueError(f"{self.place(folder)}: cannot list the folder: {error.strerror or error}") from error

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def open(self, path: str) -> io.BufferedReader:
        try:
            return cast(io.BufferedReader, open(path, "rb", buffering=BUFFER_BYTES))
        except OSError as error:
            raise ValueError(f"{self.place(path)}: cannot read the file: {error.strerror or error}") from error

    def checksum(self, path: str) -> str:
        return cached_file_digest(path)


def said(error: BaseException) -> str:
    """An error of a library in one line that is not long.

    >>> said(OSError("no such bucket\\n<html>...</html>"))
    'OSError: no such bucket'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
