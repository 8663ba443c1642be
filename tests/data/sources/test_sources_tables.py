"""Parquet and Arrow: column types, sizes and damage."""

from __future__ import annotations

import datetime
import decimal
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jdpo
from jdpo.config import DatasetConfig
from jdpo.data.sources import arrow_rows, read_rows

KINDS = ["a.parquet", "a.arrow", "a.stream.arrow"]


def write(path: Path, table: pa.Table, rows_at_once: int = 1000) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_at_once)
        return path
    opener = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
    with opener(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_at_once)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [raw for raw, _ in read_rows(DatasetConfig(path=str(path)))]


VALUES: list[tuple[pa.DataType, list[Any], list[Any]]] = [
    (pa.large_string(), ["a", None], ["a", None]),
    (pa.dictionary(pa.int8(), pa.string()), ["a", "b", None, "a"], ["a", "b", None, "a"]),
    (pa.float16(), [0.5], [0.5]),
    (pa.decimal128(9, 2), [decimal.Decimal("1.50"), None], [1.5, None]),
    (pa.date32(), [datetime.date(2026, 2, 3)], ["2026-02-03"]),
    (pa.time64("us"), [datetime.time(1, 2)], ["01:02:00"]),
    (pa.timestamp("us"), [datetime.datetime(2026, 2, 3, 4)], ["2026-02-03T04:00:00"]),
    (pa.timestamp("ns", "UTC"), [1], ["1970-01-01T00:00:00.000000001+00:00"]),
    (pa.duration("s"), [datetime.timedelta(hours=1)], ["1:00:00"]),
    (pa.binary(), ["wörd".encode(), b"\xff\xd8", None], ["wörd", b"\xff\xd8", None]),
    (pa.null(), [None], [None]),
    (pa.list_(pa.large_string(), 2), [["a", "b"]], [["a", "b"]]),
    (pa.map_(pa.string(), pa.int8()), [[("a", 1)]], [[["a", 1]]]),
    (
        pa.list_(
            pa.struct({"role": pa.string(), "content": pa.struct({"text": pa.large_string(), "at": pa.date32()})})
        ),
        [[{"role": "user", "content": {"text": "Hi", "at": None}}], None],
        [[{"role": "user", "content": {"text": "Hi"}}], None],
    ),
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("kind", "values", "expected"), VALUES, ids=[str(kind)[:20] for kind, *_ in VALUES])
def test_column_types_become_plain_values(
    tmp_path: Path, name: str, kind: pa.DataType, values: list[Any], expected: list[Any]
) -> None:
    if pa.types.is_duration(kind) and name == "a.parquet":
        kind = pa.duration("ms")  # Parquet has no seconds; it keeps finer units in Arrow's own metadata
    rows = read(write(tmp_path / name, pa.table({"a": pa.array(values, kind)})))
    assert rows == [{"a": value} for value in expected]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("kind", "row"), [(pa.timestamp("us"), 2), (pa.timestamp("us", "Mars/Phobos"), 1)], ids=["out of range", "no zone"]
)
def test_a_value_that_python_lacks_is_named_with_row_and_column(
    tmp_path: Path, name: str, kind: pa.DataType, row: int
) -> None:
    path = write(tmp_path / name, pa.table({"text": ["a", "b"], "at": pa.array([1, 2**62], kind)}))
    message = re.escape(f"{path}: row {row}: cannot read the value in column 'at' ({kind}): ")
    with pytest.raises(ValueError, match=f"^{message}.*; correct it, or remove the column$"):
        read(path)


def test_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))
    for name, message in (
        ("a.parquet", r": row 2: cannot read the value in column 'text' \(string\): UnicodeDecodeError"),
        ("a.arrow", ": not a readable Arrow file: ArrowInvalid: .*Invalid UTF8"),
    ):
        path = write(tmp_path / name, pa.table({"text": column}))
        with pytest.raises(ValueError, match=f"^{path}{message}"):
            read(path)


@pytest.mark.parametrize("name", KINDS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    with pytest.raises(ValueError, match=f"^{path}: two columns are called 'text'"):
        read(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_table_without_rows_is_empty(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.table({"a": pa.array([], pa.string())}))
    with pytest.raises(ValueError, match=f"^{path}: the file is empty"):
        read(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_larger_than_its_bound_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, pa.table({"a": ["x" * 3000, "x" * 3000, "x" * 9001]}))
    monkeypatch.setattr(arrow_rows, "MAX_ROW_BYTES", 9001)
    assert len(read(path)) == 3
    monkeypatch.setattr(arrow_rows, "MAX_ROW_BYTES", 9000)
    with pytest.raises(ValueError, match=f"^{path}: row 3: the row is larger than"):
        read(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_named_with_the_last_good_row(tmp_path: Path, name: str) -> None:
    table = pa.table({"a": [f"{i} some words" * 20 for i in range(2000)]})
    path = write(tmp_path / name, table, rows_at_once=500)
    content = bytearray(path.read_bytes())
    kind = "Parquet" if name == "a.parquet" else "Arrow"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"^{path}: not a readable {kind} file( after row [0-9]+|: )"):
        read(path)
    # Broken offsets of an Arrow file would crash a process that trusts them.
    place = content.index(b"1999 some words") - 2001 if kind == "Arrow" else len(content) // 2
    content[place - 200 : place] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: (not a readable {kind} file|row)"):
        read(path)


def test_memory_is_flat(tmp_path: Path) -> None:
    """Reads 300 MiB of rows in one row group or batch in a process that may grow by 250 MiB, without mapped files."""
    table = pa.table({"a": [f"{i:07}" * 7500 for i in range(6000)]})
    program = (
        "import re, sys, pyarrow, pyarrow.parquet\n"
        "from jdpo.config import DatasetConfig\n"
        "from jdpo.data.sources import read_rows\n"
        "def anonymous():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, peak = anonymous(), 0\n"
        "for number, _ in enumerate(read_rows(DatasetConfig(path=sys.argv[1]))):\n"
        "    if number % 50 == 0: peak = max(peak, anonymous())\n"
        "print(number + 1, (peak - before) // 1024)\n"
    )
    for name in ("a.parquet", "a.arrow"):
        path = write(tmp_path / name, table, rows_at_once=6000)
        run = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(Path(jdpo.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        )
        rows, grown = map(int, run.stdout.split() or pytest.fail(run.stderr))
        assert rows == 6000
        assert grown < 250, (name, grown)
