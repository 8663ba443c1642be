"""Files written so that a process that is killed leaves the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"
"""Ending of the name that a file has while it is being written."""

_ABANDONED_SECONDS = 86_400.0


def write_durably(path: Path, content: str | bytes, *, writer: str = "") -> None:
    """Writes a file all or nothing, and flushes it to disk before it returns.

    Args:
      content: bytes, or text, which is written as UTF-8.
      writer: see `replacing`.

    Raises:
      OSError: the folder cannot be written.
    """
    with replacing(path, writer=writer) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[IO[bytes]]:
    """Opens a temporary file that takes the place of `path` when the block ends, and is removed if the block raises.

    Args:
      writer: part of the temporary name; it must differ between processes that may write `path` at the same time.

    Raises:
      OSError: the folder cannot be written.
    """
    temporary = path.with_name(path.name + writer + TEMPORARY)
    with naming(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                # Without fsync the rename may reach the disk before the content does.
                os.fsync(file.fileno())
            # A rename within a folder is atomic: readers see the old content or the new, never a part.
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that led here matters more
                temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def unique_writer() -> str:
    """Returns a `writer` that no other process has, on this host or another one that shares the folder."""
    # The random part tells containers apart that have one host's name, and the same process ids.
    return f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_abandoned(path: Path) -> bool:
    """Returns True if nobody writes a file any more whose temporary name has a `unique_writer`.

    A process of this host is asked for; a file of another host is abandoned if it is a day old.

    Raises:
      OSError: there is no such file.
    """
    changed = path.stat().st_mtime
    here = rf"\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}{re.escape(TEMPORARY)}$"
    found = re.search(here, path.name)
    if found is None:
        return changed < time.time() - _ABANDONED_SECONDS
    return int(found[1]) == os.getpid() or not Path("/proc", found[1]).exists()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as the error of writing to an open file."""
    try:
        yield
    except OSError as error:
        # Without a number it is jdpo's own message; with a name there is nothing to add.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_path(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk. After a rename, the folder's names need it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_old(path: Path, why: str) -> Path:
    """Renames a file so that its name says why and when, such as metrics.damaged-20260731T120000Z.jsonl.

    Returns:
      The new path, in the same folder.
    """
    return rename_to_free(path, f"{path.stem}.{why}-{utc_stamp()}", path.suffix)


def rename_to_free(path: Path, stem: str, suffix: str = "") -> Path:
    """Renames a file or folder to `free_place(path, stem, suffix)` and returns the new path."""
    place = free_place(path, stem, suffix)
    path.rename(place)
    sync_path(path.parent)
    return place


def free_place(path: Path, stem: str, suffix: str = "") -> Path:
    """Returns a path in the folder of `path` that does not exist: stem + suffix, or stem-2 + suffix, and so on."""
    # lexists, so that a broken link is not overwritten either.
    names = [stem, *(f"{stem}-{count}" for count in range(2, 1000))]
    return next(place for name in names if not os.path.lexists(place := path.with_name(name + suffix)))


def utc_stamp() -> str:
    """Returns the current time in the form that file names use, such as 20260731T120000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
