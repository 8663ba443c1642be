"""Rows of Parquet and Arrow files, streamed with pyarrow."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jdpo.data.sources.files import MAX_ROW_BYTES, TOO_LARGE, File, Row, check_head
from jdpo.data.sources.json_values import quoted, text_size, without_nulls
from jdpo.data.sources.stores import BUFFER_BYTES, Disk, error_line

BATCH_ROWS, BATCH_BYTES = 128, 32 * 2**20
"""At most this many rows, and about this many bytes, are Python values at a time."""

Batches = Callable[[Any], Iterator[Any]]


def read_parquet(file: File) -> Iterator[Row]:
    """Yields the rows of a Parquet file."""

    def batches(source: Any) -> Iterator[Any]:
        with _parquet(file, source) as parquet:
            yield from parquet.iter_batches(batch_size=_parquet_batch_rows(parquet.metadata))

    return _rows(file, "Parquet", batches)


def count_parquet(file: File) -> int:
    """Returns the number of rows that the file's footer states."""

    def count(source: Any) -> Iterator[int]:
        with _parquet(file, source) as parquet:
            yield parquet.metadata.num_rows

    return sum(_opened(file, "Parquet", count))


def read_arrow(file: File) -> Iterator[Row]:
    """Yields the rows of an Arrow IPC file or stream."""
    return _rows(file, "Arrow", _arrow_batches)


def count_arrow(file: File) -> int:
    """Returns the number of rows in all record batches."""
    return sum(batch.num_rows for batch in _opened(file, "Arrow", _arrow_batches))


def python_rows(table: Any, where: Callable[[int], str]) -> list[dict[str, Any]]:
    """Converts a table or record batch to rows of JSON values.

    Decimals become floats. Times and other values that JSON lacks become strings, and so do binary values that are
    UTF-8; other binary values stay bytes. Null fields of structs are left out: every row of a struct column has all
    fields, so a null cannot be told from a missing key.

    Args:
      table: a pyarrow Table or RecordBatch.
      where: returns the name of a row, given its index in the table.

    Raises:
      ValueError: a value cannot be read, or a row is larger than MAX_ROW_BYTES.
    """
    from pyarrow import types

    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except Exception as error:  # text that is not UTF-8, times that Python cannot represent, unknown time zones, ...
        raise _bad_value(table, where, error) from error
    # The types decide once per table; walking through every value of plain columns would cost as much as reading them.
    if any(not _is_plain(field.type) for field in table.schema):
        rows = [_plain(row) for row in rows]
    # Nulls of top-level columns stay: there, null and a missing column mean the same to every schema.
    nested = [field.name for field in table.schema if types.is_nested(field.type)]
    for row in rows:
        row.update((name, without_nulls(row[name])) for name in nested)
    if table.nbytes > MAX_ROW_BYTES:  # a cheap bound: below it no row can be too large
        for index, row in enumerate(rows):
            if text_size(row) > MAX_ROW_BYTES:
                raise ValueError(f"{where(index)}: the row is {TOO_LARGE}")
    return rows


def _rows(file: File, kind: str, batches: Batches) -> Iterator[Row]:
    number = 0

    def progress() -> str:
        return f" after row {number}" if number else ""

    for batch in _opened(file, kind, batches, progress):
        if number == 0:
            _check_names(batch.schema, file)
        # A batch may have any number of rows of any size; slices bound how many are Python values at a time.
        step = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, step):
            for row in python_rows(batch.slice(start, step), functools.partial(_row_name, file.place, number + 1)):
                number += 1
                yield row, f"{file.label}:{number}"


def _row_name(place: str, first: int, index: int) -> str:
    return f"{place}: row {first + index}"


def _opened(file: File, kind: str, use: Batches, progress: Callable[[], str] = lambda: "") -> Iterator[Any]:
    """Opens a file and yields what `use` yields for it; errors of pyarrow become ValueErrors that name the file."""
    import pyarrow as pa

    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(file.open())
            if not stream.peek(1):
                return  # an empty file, which cannot be memory-mapped
            # peek does not consume bytes, so the checks leave the stream at its start.
            check_head(stream, file, allowed=b"ARROW1" if kind == "Arrow" else b"PAR1")
            # On disk, Arrow files are mapped and not copied. Remote files are read through a Python stream.
            if isinstance(file.store, Disk):
                source = stack.enter_context((pa.memory_map if kind == "Arrow" else pa.OSFile)(file.path))
            else:
                source = pa.PythonFile(stream, mode="r")
            yield from use(source)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file.place}: not a readable {kind} file{progress()}: {error_line(error)}; download or write it again"
        ) from error


def _parquet(file: File, source: Any) -> Any:
    import pyarrow.parquet as pq

    # On disk, columns are read through small buffers, which saves memory. On a remote store every jump between columns
    # is a request, so whole columns are read at once.
    return pq.ParquetFile(source, buffer_size=BUFFER_BYTES if isinstance(file.store, Disk) else 0)


def _parquet_batch_rows(metadata: Any) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    # The footer has uncompressed sizes per row group; the largest average row limits the batch.
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0.0)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, row_bytes))))


def _arrow_batches(source: Any) -> Iterator[Any]:
    """Yields record batches after validation, which Arrow leaves out; damaged offsets would crash the process."""
    import pyarrow as pa

    # The file format starts with a magic number, the stream format (of `datasets.save_to_disk`) does not.
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(source))
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _check_names(schema: Any, file: File) -> None:
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.place}: the name of a column is not UTF-8 text; write the file again") from error
    # to_pylist would keep only the last of two columns with one name.
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file.place}: two columns are called {quoted(twice)}; rename or remove one of them")


def _bad_value(table: Any, where: Callable[[int], str], error: Exception) -> ValueError:
    """Returns an error that names the row and column that cannot be read."""
    # Arrow's error does not tell the value, so every one is tried. This is slow, but happens once, before the run ends.
    for index in range(table.num_rows):
        for field, column in zip(table.schema, table.slice(index, 1).columns, strict=True):
            try:
                column.to_pylist()
            except Exception as reason:
                kind = "with field names that are not UTF-8"
                with contextlib.suppress(UnicodeDecodeError):
                    kind = str(field.type)[:80]
                return ValueError(
                    f"{where(index)}: cannot read the value in column {quoted(field.name)} ({kind}): "
                    f"{error_line(reason)}; correct it, or remove the column"
                )
    return ValueError(f"{where(0)}: cannot read this row and the rows after it: {error_line(error)}")


def _is_plain(kind: Any) -> bool:
    """Returns whether `to_pylist` turns values of an Arrow type into JSON values."""
    from pyarrow import types

    # A nested type is plain if all types inside it are.
    if types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    # float16 is not in the list: pyarrow returns it as a numpy scalar.
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_float32, types.is_float64)
    return types.is_boolean(kind) or types.is_null(kind) or any(test(kind) for test in tests)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
        return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    # datetime is a subclass of date, so this covers all three.
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    return str(value)
