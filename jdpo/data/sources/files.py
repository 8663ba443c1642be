"""Data files: their bytes, lines and digests, with errors that name the file and the line."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from jdpo.data.sources.stores import Store
from jdpo.file_digests import stream_digest

MAX_ROW_BYTES = 64 * 2**20
"""A larger row is an error: either the file is not what its name says, or the row exceeds any model's context."""

TOO_LARGE = f"larger than {MAX_ROW_BYTES >> 20} MiB"

Row = tuple[dict[str, Any], str]
"""A raw row, and its origin for messages, such as `pairs.jsonl:17`."""

_BOM = b"\xef\xbb\xbf"
_HEADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data; run `git lfs pull` in its repository"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "gzip data; rename it to end in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PAR1", "Parquet data; rename it to end in .parquet"),
    (b"ARROW1", "Arrow data; rename it to end in .arrow"),
    (b"<!doctype", "a web page; was an error or login page saved in place of the data?"),
    (b"<html", "a web page; was an error or login page saved in place of the data?"),
)
"""First bytes of files whose content is not what their name says, and what to do about each."""


class File(NamedTuple):
    """One data file.

    Attributes:
      store: the disk or the remote store that holds it.
      path: its path in the store.
      label: its name in origins.
    """

    store: Store
    path: str
    label: str

    @property
    def place(self) -> str:
        """The file's name in messages."""
        return self.store.place(self.path)

    def open(self) -> io.BufferedReader:
        """Opens the file's bytes as they are stored."""
        return self.store.open(self.path)

    def digest(self) -> str:
        """Returns a digest of the bytes: the store's own hash if it keeps one, otherwise the SHA-256."""
        with errors_at(lambda: self.place):
            # For a remote file this saves a download just to find out that nothing has changed.
            checksum = self.store.checksum(self.path)
            if checksum is not None:
                return checksum
            with self.open() as stream:
                return stream_digest(stream)


def lines(file: File) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of every line of a text file, with its line end and without a byte order mark.

    Raises:
      ValueError: a line is not UTF-8, contains a NUL byte or is longer than MAX_ROW_BYTES; or the gzip file is damaged.
    """
    number = 0
    with opened(file, lambda: f"{file.place}:{number + 1}") as stream:
        # A limit, because a file without line breaks would be read into memory as one line.
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"{file.place}:{number}: the line is {TOO_LARGE}; are line breaks missing?")
            yield number, decoded(line, f"{file.place}:{number}")


@contextlib.contextmanager
def opened(file: File, where: Callable[[], str]) -> Iterator[io.BufferedReader]:
    """Opens a text file, through gzip if its name ends in .gz.

    Args:
      file: the file.
      where: returns the current position, for errors while reading.
    """
    with errors_at(where), contextlib.ExitStack() as stack:
        stream = stack.enter_context(file.open())
        if file.label.lower().endswith(".gz"):
            check_head(stream, file, allowed=b"\x1f\x8b")
            # No second buffer: the lines before a damaged place are then yielded first, and the error has its line.
            stream = cast(io.BufferedReader, stack.enter_context(gzip.GzipFile(fileobj=stream)))
        check_head(stream, file)
        yield stream


def check_head(stream: io.BufferedReader, file: File, *, allowed: bytes = b"") -> None:
    """Checks that the first bytes of a file fit its name.

    Args:
      allowed: the first bytes that the name promises.

    Raises:
      ValueError: the file has another format; the message says which.
    """
    head = stream.peek(32)[:32].removeprefix(_BOM).lower()
    for beginning, what in _HEADS:
        if beginning != allowed and head.startswith(beginning.lower()):
            raise ValueError(f"{file.place}: the file is {what}")


@contextlib.contextmanager
def errors_at(where: Callable[[], str]) -> Iterator[None]:
    """Turns errors of reading into ValueErrors that name the place."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{where()}: the gzip file is cut short or damaged here: {error}; download or write it again"
        ) from error
    except OSError as error:
        raise ValueError(f"{where()}: cannot read the file: {error.strerror or error}") from error


def decoded(line: bytes, where: str) -> str:
    """Returns the text of a line.

    Raises:
      ValueError: it is not UTF-8, or contains a NUL byte.
    """
    # A NUL byte is valid UTF-8 but never part of JSON or CSV: the file is UTF-16, or a disk error zeroed a block.
    if b"\0" in line:
        raise ValueError(
            f"{where}: NUL byte at position {line.index(0)}: the file is damaged, or UTF-16; save it as UTF-8"
        )
    try:
        return line.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at position {error.start}); "
            "save it as UTF-8"
        ) from None
