"""SHA-256 digests of files."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path


def file_digest(path: str | os.PathLike[str]) -> str:
    """Reads a file and returns its SHA-256 digest as 64 hexadecimal digits.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return stream_digest(file)


def stream_digest(stream: io.BufferedIOBase) -> str:
    """Reads a stream from its current position to its end and returns the SHA-256 digest of what it read."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_file_digest(path: str | os.PathLike[str]) -> str:
    """Returns `file_digest(path)`, without reading a file again whose size and modification time are unchanged.

    A run asks for the same digests several times, and reading large files takes long.
    """
    found = os.stat(path)
    # Size and time are part of the cache's key, so a changed file is read again.
    return _digest_of_state(os.fspath(path), found.st_size, found.st_mtime_ns)


def files_digest(paths: Iterable[Path]) -> str:
    """Returns a digest of the names and contents of files, in their order; each is read as by `cached_file_digest`."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + bytes.fromhex(cached_file_digest(path)))
    return digest.hexdigest()


def code_digests(package: Path) -> dict[str, str]:
    """Returns {path within the package: SHA-256 digest} of the files of an installed package, sorted by path.

    Two processes with equal results run the same code. Compiled bytecode, which Python writes by itself, is left out.

    Raises:
      OSError: a file cannot be read.
    """
    digests = {}
    for folder, inner, names in os.walk(package):
        inner[:] = sorted(name for name in inner if name != "__pycache__")
        for name in sorted(names):
            if not name.endswith(".pyc"):
                path = Path(folder, name)
                digests[path.relative_to(package).as_posix()] = file_digest(path)
    return dict(sorted(digests.items()))


@functools.lru_cache(maxsize=1024)
def _digest_of_state(path: str, size: int, mtime_ns: int) -> str:
    return file_digest(path)
