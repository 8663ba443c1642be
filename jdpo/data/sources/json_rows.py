"""Rows of JSON files: one object a line, or one array of objects."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from jdpo.data.sources.files import MAX_ROW_BYTES, TOO_LARGE, File, Row, lines, opened
from jdpo.data.sources.values import DECODER, checked_row, json_kind, unreadable

CHUNK_BYTES = 2**20

_SPACES = re.compile(r"[ \t\n\r]*")
_ONE_PER_LINE = "a JSONL file holds one JSON object per line"
_NAMED_JSON = "A file with an array of objects, or with objects of several lines, is read if its name ends in .json"
_LONGEST_CUT = 16
"""An error of syntax farther than this from the end of the text is not because the text ends (or a string is open)."""


def read_json_lines(file: File) -> Iterator[Row]:
    """Rows of a file with one object a line; blank lines are passed over."""
    for number, text in lines(file):
        if text.isspace() or not text:
            continue
        where = f"{file.place}:{number}"
        try:
            value = DECODER.decode(text)
        except json.JSONDecodeError as error:
            found = f"broken JSON: {error.msg} (column {error.colno})"
            raise ValueError(f"{where}: {found}; {_ONE_PER_LINE}{_advice(text, error)}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {unreadable(error)}") from None
        if isinstance(value, list):
            found = "expected an object with the row's columns, found an array"
            raise ValueError(f"{where}: {found}; {_ONE_PER_LINE}. {_NAMED_JSON}")
        yield checked_row(value, text.count("[") + text.count("{"), where), f"{file.label}:{number}"


def _advice(line: str, error: json.JSONDecodeError) -> str:
    """What to do about a line that is not one JSON object."""
    text = line.strip()
    if text.startswith("["):
        return f". {_NAMED_JSON}"
    # A string that is not closed is reported where it begins, and reads as a control character where the line ends.
    ends = error.pos >= len(line.rstrip()) or error.msg.startswith(("Unterminated string", "Invalid control character"))
    if text.startswith("{") and ends:
        return f", and this object does not end on its line: write each object on a line of its own. {_NAMED_JSON}"
    if error.msg == "Extra data":
        return ", and something follows the object on this line" + (" (no comma is needed)" if text[-1] == "," else "")
    return ""


def count_json_lines(file: File) -> int:
    """How many rows `read_json_lines` gives."""
    return sum(not text.isspace() for _, text in lines(file) if text)


def read_json(file: File) -> Iterator[Row]:
    """Rows of a file that holds an array of objects, or else objects one after the other, each over any lines."""
    window = _Window(file)
    with opened(file, lambda: f"{file.place}:{window.line}") as window.stream:
        first = window.peek()
        if first == "[":
            yield from _elements(window, file)
        elif first == "{":
            yield from _objects(window, file)
        elif first:
            raise ValueError(f"{file.place}: expected an array of objects, found {json_kind(window.value())}")


def _elements(window: _Window, file: File) -> Iterator[Row]:
    index = 0
    window.step(1)
    if window.peek() != "]":
        while True:
            yield window.row(), f"{file.label}[{index}]"
            index += 1
            following = window.peek()
            if following == "]":
                break
            if following != ",":
                raise window.broken("Expecting ',' delimiter", 0)
            window.step(1)
            window.peek()
    window.step(1)
    if window.peek():
        raise window.broken("Extra data behind the array", 0)


def _objects(window: _Window, file: File) -> Iterator[Row]:
    line, row = window.line, window.row()
    if not window.peek():
        raise ValueError(
            f"{file.place}: expected an array of objects, found an object; "
            "if it is a row, put [ and ] around it, and if it holds the rows, give a file of them alone"
        )
    yield row, f"{file.label}:{line}"
    while window.peek():
        line = window.line
        yield window.row(), f"{file.label}:{line}"


class _Window:
    """The text of a file from the place that is read on; only what a row needs is in memory.

    Attributes:
      stream: the file's bytes.
      line: number of the line of that place.
    """

    stream: io.BufferedReader

    def __init__(self, file: File) -> None:
        self.line = 1
        self._file = file
        self._column = 1
        self._text = ""
        self._at = 0
        self._brackets = 0  # in the value parsed last
        self._ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """Steps over spaces and shows the next character; empty at the end of the file."""
        while True:
            match = _SPACES.match(self._text, self._at)
            assert match is not None
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def step(self, count: int) -> None:
        """Steps over characters that were peeked at."""
        self._move(self._at + count)

    def row(self) -> dict[str, Any]:
        """Parses an object and steps behind it."""
        where, value = f"{self._file.place}:{self.line}", self.value()
        return checked_row(value, self._brackets, where)

    def value(self) -> Any:
        """Parses a value and steps behind it."""
        where = f"{self._file.place}:{self.line}"
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if not is_open and error.pos < len(self._text) - _LONGEST_CUT:
                    raise self.broken(error.msg, error.pos - self._at) from None
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise ValueError(f"{where}: the row is {TOO_LARGE}, or a quote in it is left open") from None
                if not self._read_on():
                    raise self.broken(error.msg, error.pos - self._at) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {unreadable(error)}") from None
            else:
                break
        if end - self._at > MAX_ROW_BYTES:
            raise ValueError(f"{where}: the row is {TOO_LARGE}")
        self._brackets = self._text.count("[", self._at, end) + self._text.count("{", self._at, end)
        self._move(end)
        return value

    def broken(self, message: str, offset: int) -> ValueError:
        """An error of syntax so many characters from here."""
        self._move(self._at + offset)
        ends = ": the file ends here" if self._ended and self._at >= len(self._text) else ""
        return ValueError(f"{self._file.place}:{self.line}: broken JSON: {message} (column {self._column}){ends}")

    def _move(self, to: int) -> None:
        newlines = self._text.count("\n", self._at, to)
        if newlines:
            self.line += newlines
            self._column = to - self._text.rindex("\n", self._at, to)
        else:
            self._column += to - self._at
        self._at = to

    def _read_on(self) -> bool:
        """Takes more of the file into the text, at least as much as waits in it; False where there is no more."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        data = self.stream.read(max(CHUNK_BYTES, len(self._text)))
        self._ended = not data
        if b"\0" in data:
            raise ValueError(
                f"{self._file.place}:{self._line_behind(data[: data.index(0)])}: a NUL byte: the file is damaged, "
                "or UTF-16; save it as UTF-8"
            )
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._file.place}:{self._line_behind(error.object[: error.start])}: not UTF-8 text "
                f"(byte 0x{error.object[error.start]:02x}); save it as UTF-8"
            ) from None
        return True

    def _line_behind(self, data: bytes) -> int:
        return self.line + self._text.count("\n") + data.count(b"\n")
