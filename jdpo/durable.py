"""Small files, written so that a killed process leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp"
"""How the name of a file that is being written ends."""


def write_durably(path: Path, content: str | bytes, *, writer: str = "") -> None:
    """Writes all or nothing, and onto the disk before it returns.

    Args:
      content: bytes, or text that is written as UTF-8.
      writer: tells writers apart that may write the same file at the same time.

    Raises:
      OSError: the folder cannot be written.
    """
    temporary = path.with_name(path.name + writer + TEMPORARY)
    with naming(path):
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to errors that lack it, as those of writing to an open file do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder onto the disk: after a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_old(path: Path, why: str) -> Path:
    """Renames a file to one next to it that says why and when, such as metrics.damaged-20260731T120000Z.jsonl.

    Returns:
      the new place.
    """
    return rename_to_free(path, f"{path.stem}.{why}-{utc_stamp()}", path.suffix)


def rename_to_free(path: Path, stem: str, suffix: str = "") -> Path:
    """Renames a file or folder to `free_place(path, stem, suffix)`, and returns that."""
    place = free_place(path, stem, suffix)
    path.rename(place)
    sync_folder(path.parent)
    return place


def free_place(path: Path, stem: str, suffix: str = "") -> Path:
    """A path next to `path` that is free: stem + suffix, with a number between the two where that is taken."""
    names = [stem, *(f"{stem}-{count}" for count in range(2, 1000))]
    return next(place for name in names if not os.path.lexists(place := path.with_name(name + suffix)))


def utc_stamp() -> str:
    """The time as it is written into names: 20260731T120000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
