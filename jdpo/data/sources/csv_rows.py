"""Rows of CSV and TSV files, whose first line names the columns."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Iterator, Sequence

from jdpo.data.sources.files import MAX_ROW_BYTES, TOO_LARGE, File, Row, lines
from jdpo.data.sources.values import shown

_ADVICE = {
    "unexpected end of data": "the file ends inside a quoted cell; a quote is left open, or the file is cut short",
    "new-line character seen": "a carriage return stands in a cell without quotes; put quotes around the cell",
    "expected after": "something follows a closing quote; a quote within a cell is written twice",
}
"""What Python's words for a fault mean to who wrote the file."""


def read_csv(file: File, *, delimiter: str = ",") -> Iterator[Row]:
    """Rows of a table, every value a string; an empty cell is null, and blank lines are passed over."""
    header: list[str] | None = None
    for number, cells in _records(file, delimiter):
        where = f"{file.place}:{number}"
        if header is None:
            header = _checked_header(cells, delimiter, where)
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: expected {len(header)} cells as in the header, found {len(cells)}; "
                "a cell with commas, tabs or line ends in it needs quotes around it"
            )
        yield {name: cell or None for name, cell in zip(header, cells, strict=True)}, f"{file.label}:{number}"


read_tsv = functools.partial(read_csv, delimiter="\t")


def count_csv(file: File, *, delimiter: str = ",") -> int:
    """How many rows `read_csv` gives."""
    return max(0, sum(1 for _ in _records(file, delimiter)) - 1)


count_tsv = functools.partial(count_csv, delimiter="\t")


def _records(file: File, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line of its beginning, cells) of every record that is not a blank line."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # of the process; the bound on rows is ours
    begins, size = 1, 0

    def text() -> Iterator[str]:
        nonlocal size
        for _, line in lines(file):
            size += len(line)
            if size > MAX_ROW_BYTES:
                raise ValueError(f"{file.place}:{begins}: the row is {TOO_LARGE}; is a quote in it left open?")
            yield line

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins, size = reader.line_num + 1, 0
    except csv.Error as error:
        meaning = next((advice for words, advice in _ADVICE.items() if words in str(error)), str(error))
        raise ValueError(f"{file.place}:{begins}: broken CSV: in the row that begins here, {meaning}") from None


def _checked_header(names: Sequence[str], delimiter: str, where: str) -> list[str]:
    """The names of the columns; the first may be empty, as that of the index that pandas writes is."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise ValueError(f"{where}: two columns are called {shown(twice[0])}; the first line names each column once")
    empty = [index for index, name in enumerate(names) if index and not name.strip()]
    if empty:
        raise ValueError(f"{where}: column {empty[0] + 1} has no name; the first line names every column")
    other = next((other for other in ",;\t|" if other != delimiter and other in names[0]), None)
    if len(names) == 1 and other:
        raise ValueError(
            f"{where}: one column, called {shown(names[0])}: are cells divided by {other!r}? "
            "A .csv file has commas between cells, a .tsv file tabs"
        )
    return list(names)
