"""Rows that Python code gives, written to a file that the readers of files take.

A list of dicts becomes JSONL, in which absent keys stay absent. A `datasets.Dataset` becomes an Arrow stream, as
`datasets.save_to_disk` writes it.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from jdpo.durable import replacing
from jdpo.safe_text import terminal
from jdpo.words import figure

if TYPE_CHECKING:
    from datasets import Dataset

Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]] | str | os.PathLike[str]"
"""Rows as Python code gives them: a dataset, a list of dicts, or the path of a file."""

BATCH_ROWS = 1000

_ADVICE = {
    "datasets.IterableDataset": "it can be read only once, and training reads rows again; give list(rows), or "
    "datasets.Dataset.from_list(list(rows))",
    "datasets.DatasetDict": 'it has several splits; give one of them, such as rows["train"]',
    "datasets.IterableDatasetDict": 'it has several splits, which can be read only once; give list(rows["train"])',
    "pandas.DataFrame": "give datasets.Dataset.from_pandas(rows, preserve_index=False)",
    "polars.DataFrame": "give datasets.Dataset.from_polars(rows)",
    "pyarrow.Table": "give datasets.Dataset(rows)",
    "builtins.dict": "a dict of columns is given as datasets.Dataset.from_dict(rows), and one row as a list of it",
}
"""Class that is no rows -> what to give instead."""


class RowsForm(Protocol):
    """Rows that can be written to a file.

    Attributes:
      ending: of the name of the file.
      num_rows: their number.
    """

    ending: str
    num_rows: int

    def write(self, path: Path) -> None:
        """Writes the rows, all or nothing.

        Raises:
          ValueError: a row cannot be written; the message names it.
        """

    def difference(self, path: Path) -> str | None:
        """Returns in words how the rows differ from those of a file that `write` wrote; None if they are the same."""


def form_of(rows: object, name: str) -> RowsForm | None:
    """Returns how rows are written to a file; None if they are the path of one.

    Args:
      name: of the rows, for messages.

    Raises:
      ValueError: this kind of rows cannot be read, or there are none; the message says what to give instead.
    """
    if isinstance(rows, str | os.PathLike):
        return None
    classes = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(rows).__mro__}
    if advice := [text for cls, text in _ADVICE.items() if cls in classes]:
        kind = type(rows).__name__
        raise ValueError(f"{name} is {'an' if kind[0] in 'AEIOU' else 'a'} {kind}: {advice[0]}")
    form: RowsForm
    if "datasets.Dataset" in classes:
        form = _Table(rows, name)
    elif isinstance(rows, Sequence) and not isinstance(rows, bytes | bytearray):
        form = _Listed(rows, name)
    else:
        again = "; give list(rows)" if isinstance(rows, Iterable) else ""
        raise ValueError(
            f"{name}: expected a datasets.Dataset, a list of dicts or a path, found {type(rows).__name__}{again}"
        )
    if not form.num_rows:
        raise ValueError(f"{name} is empty: it has no rows")
    return form


class _Listed:
    """Rows in a list, one JSON object per line."""

    ending = ".jsonl"

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self.num_rows = len(rows)
        self._rows, self._name = rows, name

    def write(self, path: Path) -> None:
        with replacing(path) as file:
            file.writelines(self._lines())

    def difference(self, path: Path) -> str | None:
        with path.open("rb") as file:
            for number, (old, new) in enumerate(itertools.zip_longest(file, self._lines()), start=1):
                if old is None or new is None:
                    return f"it has {figure(self.num_rows, 'row')} now, and had {'more' if new is None else 'fewer'}"
                if old != new and not _same_json(old, new):
                    return f"row {number} differs"
        return None

    def _lines(self) -> Iterator[bytes]:
        for index, row in enumerate(self._rows):
            where = f"{self._name}[{index}]"
            if not isinstance(row, Mapping):
                hint = "; paths of several files are given in the config, as datasets" if isinstance(row, str) else ""
                raise ValueError(f"{where}: expected a dict of columns, found {type(row).__name__}{hint}")
            yield _json_line(dict(row), where)


def _json_line(row: dict[str, Any], where: str) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_json_value)
    # RecursionError: a list that contains itself, or thousands of levels.
    except (TypeError, ValueError, RecursionError) as error:
        column = next((name for name, value in row.items() if not _is_json(value)), "")
        raise ValueError(
            f"{where}: column {terminal(column)!r} cannot be kept as JSON: {terminal(error)}; give text, numbers, "
            "true or false, None, and lists and dicts of these"
        ) from None
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write as an escape; the reader reports it
        return f"{json.dumps(row, allow_nan=False, default=_json_value)}\n".encode()


def _json_value(value: Any) -> Any:
    """Returns a value that json does not know in the form in which it would be read from an Arrow file."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime.date | datetime.time):  # and datetime, a subclass of date
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if hasattr(value, "tolist"):  # arrays, and the scalars of numpy
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, default=_json_value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _same_json(old: bytes, new: bytes) -> bool:
    try:
        return bool(json.loads(old) == json.loads(new))
    except (ValueError, RecursionError):  # a damaged file
        return False


class _Table:
    """The rows of a `datasets.Dataset`, as a stream of Arrow batches with the dataset's features in its schema."""

    ending = ".arrow"

    def __init__(self, dataset: Any, name: str) -> None:
        if dataset.format["type"] == "custom":
            raise ValueError(f"{name} has a transform, which files do not keep; apply it with dataset.map")
        self.num_rows = len(dataset)
        self._dataset = dataset

    def write(self, path: Path) -> None:
        import pyarrow as pa

        schema = self._dataset.features.arrow_schema
        with replacing(path) as file, pa.ipc.new_stream(file, schema) as stream:
            for table in self._tables():
                stream.write_table(table.cast(schema))

    def difference(self, path: Path) -> str | None:
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                kept = stream.read_all()
                return self._difference(kept)
        except pa.ArrowException:
            return f"{path} is damaged"

    def _difference(self, kept: Any) -> str | None:
        if kept.num_rows != self.num_rows:
            return f"it has {figure(self.num_rows, 'row')} now, and had {kept.num_rows:,}"
        # A dict whose keys come in another order is the same row.
        names = self._dataset.column_names
        if set(names) != set(kept.column_names):
            return f"it has the columns {', '.join(names)} now, and had {', '.join(kept.column_names)}"
        kept, first = kept.select(names), 0
        for table in self._tables():
            before = kept.slice(first, table.num_rows)
            if not before.equals(table):
                # Compared as Python values: types may differ where values do not, and NaN equals nothing in Arrow.
                pairs = zip(before.to_pylist(), table.to_pylist(), strict=True)
                differing = [index for index, (old, new) in enumerate(pairs) if repr(old) != repr(new)]
                if differing:
                    return f"row {first + differing[0] + 1} differs"
            first += table.num_rows
        return None

    def _tables(self) -> Iterator[Any]:
        # In batches, since selected and shuffled rows are gathered as they are read.
        yield from self._dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
