"""A data file: its bytes, lines and digest, with errors that say which file and where in it."""

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
"""A larger row is an error: it is a file that is not what its name says, or more than any model reads."""

TOO_LARGE = f"larger than {MAX_ROW_BYTES >> 20} MiB"

Row = tuple[dict[str, Any], str]
"""A raw row and its origin, for messages."""

_BOM = b"\xef\xbb\xbf"
_HEADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data; run `git lfs pull` where it comes from"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "gzip data; let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PAR1", "Parquet data; let its name end in .parquet"),
    (b"ARROW1", "Arrow data; let its name end in .arrow"),
    (b"<!doctype", "a web page; was an error or login page saved in place of the data?"),
    (b"<html", "a web page; was an error or login page saved in place of the data?"),
)
"""How files begin that are something else than the rows their name promises."""


class File(NamedTuple):
    """One data file.

    Attributes:
      store: where it lies.
      path: its path there.
      label: its name in origins.
    """

    store: Store
    path: str
    label: str

    @property
    def place(self) -> str:
        """Its name in messages."""
        return self.store.place(self.path)

    def open(self) -> io.BufferedReader:
        """Its bytes as they are stored."""
        return self.store.open(self.path)

    def digest(self) -> str:
        """A digest of its bytes: the store's own hash where that is one, else the sha256 of reading it."""
        with naming(lambda: self.place):
            checksum = self.store.checksum(self.path)
            if checksum is not None:
                return checksum
            with self.open() as stream:
                return stream_digest(stream)


def lines(file: File) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of every line of a text file, line end included, without a byte order mark.

    Raises:
      ValueError: a line is not UTF-8, holds a NUL byte or is longer than a row may be; the gzip file is damaged.
    """
    number = 0
    with opened(file, lambda: f"{file.place}:{number + 1}") as stream:
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"{file.place}:{number}: the line is {TOO_LARGE}; are line ends missing?")
            yield number, decoded(line, f"{file.place}:{number}")


@contextlib.contextmanager
def opened(file: File, where: Callable[[], str]) -> Iterator[io.BufferedReader]:
    """Opens a text file, through gzip where its name says so.

    Args:
      file: what to open.
      where: how far it was read, for errors of reading.
    """
    with naming(where), contextlib.ExitStack() as stack:
        stream = stack.enter_context(file.open())
        if file.label.lower().endswith(".gz"):
            check_head(stream, file, allowed=b"\x1f\x8b")
            # Not buffered once more: what stands before a fault is then given first, and the fault has its line.
            stream = cast(io.BufferedReader, stack.enter_context(gzip.GzipFile(fileobj=stream)))
        check_head(stream, file)
        yield stream


def check_head(stream: io.BufferedReader, file: File, *, allowed: bytes = b"") -> None:
    """Looks at the first bytes of a file.

    Raises:
      ValueError: they show that it is something else than its name says; `allowed` begins what it says.
    """
    head = stream.peek(32)[:32].removeprefix(_BOM).lower()
    for beginning, what in _HEADS:
        if beginning != allowed and head.startswith(beginning.lower()):
            raise ValueError(f"{file.place}: the file is {what}")


@contextlib.contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Turns errors of reading into ones that say where."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{where()}: the gzip file is cut short or damaged here: {error}; fetch or write it again"
        ) from error
    except OSError as error:
        raise ValueError(f"{where()}: cannot read the file: {error.strerror or error}") from error


def decoded(line: bytes, where: str) -> str:
    """The text of a line.

    Raises:
      ValueError: it is not UTF-8, or holds a NUL byte.
    """
    if b"\0" in line:
        raise ValueError(
            f"{where}: a NUL byte at position {line.index(0)}: the file is damaged, or UTF-16; save it as UTF-8"
        )
    try:
        return line.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at position {error.start}); "
            "save it as UTF-8"
        ) from None
