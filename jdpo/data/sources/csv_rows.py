"""Rows of CSV and TSV files, read with the standard library's csv module. The first line names the columns."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Iterator, Sequence

from jdpo.data.sources.files import MAX_ROW_BYTES, TOO_LARGE, File, Row, lines
from jdpo.data.sources.json_values import quoted

_EXPLANATIONS = {
    "unexpected end of data": "the file ends inside a quoted cell; a closing quote is missing, or it is cut short",
    "new-line character seen": "a cell without quotes contains a carriage return; put quotes around the cell",
    "expected after": "a closing quote is followed by text; a quote inside a cell must be doubled",
}
"""Part of an error message of the csv module -> what is wrong with the file."""


def read_csv(file: File, *, delimiter: str = ",") -> Iterator[Row]:
    """Yields the rows of a table. Values are strings, empty cells null; blank lines are skipped."""
    header: list[str] | None = None
    for number, cells in _records(file, delimiter):
        where = f"{file.place}:{number}"
        if header is None:
            header = _checked_header(cells, delimiter, where)
            continue
        if len(cells) != len(header):
            advice = "put quotes around cells that contain commas, tabs or line breaks"
            if len(cells) < len(header):
                advice = "fill in the row, with nothing between two separators for an empty cell"
            raise ValueError(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}; {advice}")
        # CSV cannot tell an empty string from a missing value; missing is the more common meaning.
        yield {name: cell or None for name, cell in zip(header, cells, strict=True)}, f"{file.label}:{number}"


read_tsv = functools.partial(read_csv, delimiter="\t")


def count_csv(file: File, *, delimiter: str = ",") -> int:
    """Returns the number of rows that `read_csv` yields."""
    return max(0, sum(1 for _ in _records(file, delimiter)) - 1)


count_tsv = functools.partial(count_csv, delimiter="\t")


def _records(file: File, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its first line, cells) for every record that is not a blank line."""
    # The csv module's own limit of 128 KiB per cell holds for the whole process; the limit on rows below replaces it.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    first_line, size = 1, 0

    def text() -> Iterator[str]:
        nonlocal size
        # The csv module takes further lines as long as a quote is open. Their total size is bounded here, so that a
        # missing quote does not read the whole file into one cell.
        for _, line in lines(file):
            size += len(line)
            if size > MAX_ROW_BYTES:
                raise ValueError(f"{file.place}:{first_line}: the row is {TOO_LARGE}; is a closing quote missing?")
            yield line

    # strict: without it, a quote in the middle of a cell is accepted and gives a wrong value.
    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if cells:
                yield first_line, cells
            first_line, size = reader.line_num + 1, 0
    except csv.Error as error:
        reason = next((meaning for words, meaning in _EXPLANATIONS.items() if words in str(error)), str(error))
        raise ValueError(f"{file.place}:{first_line}: broken CSV: in the row that starts here, {reason}") from None


def _checked_header(names: Sequence[str], delimiter: str, where: str) -> list[str]:
    """Returns the column names. The first may be empty, since pandas writes its index without a name."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise ValueError(f"{where}: two columns are called {quoted(twice[0])}; give each column a name of its own")
    empty = [index for index, name in enumerate(names) if index and not name.strip()]
    if empty:
        raise ValueError(f"{where}: column {empty[0] + 1} has no name; the first line must name every column")
    # A single column whose name contains another delimiter is most likely a file with that delimiter.
    other = next((other for other in ",;\t|" if other != delimiter and other in names[0]), None)
    if len(names) == 1 and other:
        raise ValueError(
            f"{where}: found one column, called {quoted(names[0])}; are the cells separated by {other!r}? "
            "Expected commas in a .csv file, tabs in a .tsv file"
        )
    return list(names)
