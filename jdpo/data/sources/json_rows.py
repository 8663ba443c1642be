"""Rows of JSON files: one object per line, one array of objects, or objects one after the other.

The standard library's decoder parses; what is here feeds it a file of any size piece by piece, and keeps the line of
every row for messages.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from jdpo.data.sources.files import MAX_ROW_BYTES, TOO_LARGE, File, Row, lines, opened
from jdpo.data.sources.json_values import DECODER, checked_row, json_kind, unreadable

CHUNK_BYTES = 2**20

_SPACES = re.compile(r"[ \t\n\r]*")
_ONE_PER_LINE = "a JSONL file has one JSON object per line"
_NAMED_JSON = "Rename a file with an array of objects, or with objects over several lines, to end in .json"
_LONGEST_CUT = 16
"""A syntax error farther than this from the end of the text read so far is an error of the file.

Closer to the end, the value may just not be complete yet. Unterminated strings are reported where they start and may
always be incomplete.
"""


def read_json_lines(file: File) -> Iterator[Row]:
    """Yields the rows of a file with one object per line; blank lines are skipped."""
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
    """Returns advice for a line that is not one JSON object."""
    text = line.strip()
    if text.startswith("["):
        return f". {_NAMED_JSON}"
    # A string left open is reported at its start, or as a control character at the end of the line.
    ends = error.pos >= len(line.rstrip()) or error.msg.startswith(("Unterminated string", "Invalid control character"))
    if text.startswith("{") and ends:
        return f", and this object does not end on its line: write each object on one line. {_NAMED_JSON}"
    if error.msg == "Extra data":
        return ", and text follows the object on this line" + (" (no comma is needed)" if text[-1] == "," else "")
    return ""


def count_json_lines(file: File) -> int:
    """Returns the number of rows that `read_json_lines` yields."""
    # Counting does not parse: a line that is not blank is a row, or an error when it is read.
    return sum(not text.isspace() for _, text in lines(file) if text)


def read_json_values(file: File) -> Iterator[Row]:
    """Yields the rows of a file with an array of objects, or with objects one after the other, over any lines."""
    reader = _JsonReader(file)
    with opened(file, lambda: f"{file.place}:{reader.line}") as reader.stream:
        first = reader.peek()
        if first == "[":
            yield from _elements(reader, file)
        elif first == "{":
            yield from _objects(reader, file)
        elif first:
            raise ValueError(f"{file.place}: expected an array of objects, found {json_kind(reader.value())}")


def _elements(reader: _JsonReader, file: File) -> Iterator[Row]:
    index = 0
    reader.skip(1)
    if reader.peek() != "]":
        while True:
            yield reader.row(), f"{file.label}[{index}]"
            index += 1
            following = reader.peek()
            if following == "]":
                break
            if following != ",":
                raise reader.syntax_error("Expecting ',' delimiter", 0)
            reader.skip(1)
            reader.peek()
    reader.skip(1)
    if reader.peek():
        raise reader.syntax_error("Extra data after the array", 0)


def _objects(reader: _JsonReader, file: File) -> Iterator[Row]:
    # A single object is more likely a file like {"data": [...]} than a dataset of one row, so it is not guessed at.
    line, row = reader.line, reader.row()
    if not reader.peek():
        raise ValueError(
            f"{file.place}: expected an array of objects, found an object; "
            "if it is a row, put [ and ] around it; if it contains the rows, save them alone as an array"
        )
    yield row, f"{file.label}:{line}"
    while reader.peek():
        line = reader.line
        yield reader.row(), f"{file.label}:{line}"


class _JsonReader:
    """Parses the JSON values of a file one after the other, with no more text in memory than a row needs.

    Attributes:
      stream: the file's bytes.
      line: the number of the current line.
    """

    stream: io.BufferedReader

    def __init__(self, file: File) -> None:
        self.line = 1
        self._file = file
        self._column = 1
        self._text = ""
        self._at = 0  # current position in the text
        self._brackets = 0  # opening brackets of the value parsed last
        self._ended = False
        # Incremental, since a chunk may end within a character; -sig drops a byte order mark.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """Skips whitespace and returns the next character without reading it; empty at the end of the file."""
        while True:
            match = _SPACES.match(self._text, self._at)
            assert match is not None
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def skip(self, count: int) -> None:
        """Moves past characters that `peek` has returned."""
        self._move(self._at + count)

    def row(self) -> dict[str, Any]:
        """Parses an object and moves past it."""
        where, value = f"{self._file.place}:{self.line}", self.value()
        return checked_row(value, self._brackets, where)

    def value(self) -> Any:
        """Parses a value and moves past it."""
        where = f"{self._file.place}:{self.line}"
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if not is_open and error.pos < len(self._text) - _LONGEST_CUT:
                    raise self.syntax_error(error.msg, error.pos - self._at) from None
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise ValueError(f"{where}: the row is {TOO_LARGE}, or a closing quote is missing") from None
                # The value may end in text that is not read yet: read more, and parse it from its start again. Each
                # reading at least doubles the text, so a value is parsed a few times at most.
                if not self._read_more():
                    raise self.syntax_error(error.msg, error.pos - self._at) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {unreadable(error)}") from None
            else:
                break
        if end - self._at > MAX_ROW_BYTES:
            raise ValueError(f"{where}: the row is {TOO_LARGE}")
        self._brackets = self._text.count("[", self._at, end) + self._text.count("{", self._at, end)
        self._move(end)
        return value

    def syntax_error(self, message: str, offset: int) -> ValueError:
        """Returns an error for the place `offset` characters after the current one."""
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

    def _read_more(self) -> bool:
        """Reads at least as much text as is waiting to be parsed; returns False at the end of the file."""
        if self._ended:
            return False
        # Text that was parsed is dropped, so memory is bounded by the largest row.
        self._text, self._at = self._text[self._at :], 0
        data = self.stream.read(max(CHUNK_BYTES, len(self._text)))
        self._ended = not data
        if b"\0" in data:
            raise ValueError(
                f"{self._file.place}:{self._line_after(data[: data.index(0)])}: NUL byte: the file is damaged, or "
                "UTF-16; save it as UTF-8"
            )
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._file.place}:{self._line_after(error.object[: error.start])}: not UTF-8 text "
                f"(byte 0x{error.object[error.start]:02x}); save it as UTF-8"
            ) from None
        return True

    def _line_after(self, data: bytes) -> int:
        return self.line + self._text.count("\n") + data.count(b"\n")
