"""The reader of each kind of file, chosen by the ending of the file's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jdpo.data.sources.arrow_rows import count_arrow, count_parquet, read_arrow, read_parquet
from jdpo.data.sources.csv_rows import count_csv, count_tsv, read_csv, read_tsv
from jdpo.data.sources.files import File, Row
from jdpo.data.sources.json_rows import count_json_lines, read_json_lines, read_json_values


class Reader(NamedTuple):
    """The reader of one kind of file.

    Attributes:
      rows: yields the rows of a file.
      count: returns their number, without parsing rows where the format allows it.
    """

    rows: Callable[[File], Iterator[Row]]
    count: Callable[[File], int]


def _count_json(file: File) -> int:
    return sum(1 for _ in read_json_values(file))


_JSON = Reader(read_json_values, _count_json)
_JSON_LINES = Reader(read_json_lines, count_json_lines)
_CSV = Reader(read_csv, count_csv)
_TSV = Reader(read_tsv, count_tsv)

READERS: dict[str, Reader] = {
    ".json": _JSON,
    ".json.gz": _JSON,
    ".jsonl": _JSON_LINES,
    ".jsonl.gz": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".ndjson.gz": _JSON_LINES,
    ".csv": _CSV,
    ".csv.gz": _CSV,
    ".tsv": _TSV,
    ".tsv.gz": _TSV,
    ".parquet": Reader(read_parquet, count_parquet),
    ".arrow": Reader(read_arrow, count_arrow),
}
"""Ending of a file's name -> its reader."""


def ending_of(name: str) -> str | None:
    """Returns the ending of a data file's name, or None if no reader has it.

    >>> ending_of("Train.JSONL.gz"), ending_of("README.md")
    ('.jsonl.gz', None)
    """
    # No ending in the table is the end of another, so the order of the table does not matter.
    return next((ending for ending in READERS if name.lower().endswith(ending)), None)


def reader_of(name: str) -> Reader:
    """Returns the reader for a data file, by its name."""
    ending = ending_of(name)
    assert ending is not None, name
    return READERS[ending]
