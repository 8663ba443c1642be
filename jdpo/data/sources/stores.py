"""The interface of a store of files, and the store of this machine's disk; `remote` has the other stores."""

from __future__ import annotations

import io
import os
import stat
from typing import Literal, NamedTuple, Protocol, cast

from jdpo.file_digests import cached_file_digest
from jdpo.safe_text import terminal

BUFFER_BYTES = 2**20

Kind = Literal["file", "folder", "other"]


class FolderEntry(NamedTuple):
    """An entry of a folder."""

    name: str
    path: str
    kind: Kind


class Store(Protocol):
    """Reads files and lists folders. Every error is a ValueError that names the path."""

    def place(self, path: str) -> str:
        """Returns the path as messages name it."""

    def kind(self, path: str) -> Kind | None:
        """Returns what the path is, or None if it does not exist."""

    def entries(self, folder: str) -> list[FolderEntry]:
        """Returns the entries of a folder, sorted by name."""

    def join(self, folder: str, name: str) -> str:
        """Returns the path of a folder's entry."""

    def open(self, path: str) -> io.BufferedReader:
        """Opens a file for reading; several may be open at a time."""

    def checksum(self, path: str) -> str | None:
        """Returns the store's own hash of a file's content, or None; it saves reading the file for its digest."""


class Disk:
    """The files of this machine, as a `Store`."""

    def place(self, path: str) -> str:
        return terminal(path)

    def kind(self, path: str) -> Kind | None:
        """Returns what the path is after following links, or None if it does not exist.

        Raises:
          ValueError: the path is a broken symlink, or may not be read.
        """
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            # os.stat follows links, so a broken link raises FileNotFoundError like a missing file.
            if os.path.islink(path):
                raise ValueError(
                    f"{self.place(path)}: broken symlink: its target {terminal(os.readlink(path))} does not exist; "
                    "correct the link, or restore its target"
                ) from None
            return None
        except OSError as error:
            raise ValueError(f"{self.place(path)}: cannot read it: {error.strerror or error}") from error
        except ValueError:  # a NUL character in the path
            return None
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    def entries(self, folder: str) -> list[FolderEntry]:
        def kind(entry: os.DirEntry[str]) -> Kind:
            return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"

        try:
            with os.scandir(folder) as found:
                return sorted(FolderEntry(entry.name, entry.path, kind(entry)) for entry in found)
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


def error_line(error: BaseException) -> str:
    """Returns the type and the first line of an error, at most 300 characters of it.

    >>> error_line(OSError("no such bucket\\n<html>...</html>"))
    'OSError: no such bucket'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
