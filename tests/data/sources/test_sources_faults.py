"""Faulty files: each is an error that names the file, the line and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.sources import files, json_rows, read_rows
from jdpo.data.sources.json_values import MAX_DEPTH

DEEP = b'{"a": %s%s}' % (b"[" * 200_000, b"]" * 200_000)
MANY_LINES = b"".join(b'{"a": %d}\n' % index for index in range(5000))
JSON, LINES = ["a.json"], ["a.jsonl", "a.ndjson"]

FAULTS: list[tuple[list[str], bytes, str]] = [
    # not text
    (LINES, b'{"a": 1}\n{"a": "\xff"}\n', r":2: not UTF-8 text \(byte 0xff at position 7\); save it as UTF-8"),
    (JSON, b'[{"a": 1},\n {"a": "\xff"}]', r":2: not UTF-8 text \(byte 0xff\); save it as UTF-8"),
    (JSON, b'[{"a": "\xc3', r":1: not UTF-8 text \(byte 0xc3\)"),
    (["a.csv"], b"a,b\n1,\xff\n", r":2: not UTF-8 text \(byte 0xff at position 2\)"),
    ([*JSON, *LINES, "a.csv"], '[{"a": 1}]\n'.encode("utf-16"), ": the file is UTF-16 text; save it as UTF-8"),
    ([*JSON, *LINES, "a.csv"], b"\xfe\xff" + '[{"a": 1}]\n'.encode("utf-16-be"), ": the file is UTF-16 text"),
    ([*LINES, "a.tsv"], '{"a": 1}\n'.encode("utf-16-le"), ":1: NUL byte at position 1: the file is damaged, or UTF"),
    (LINES, b'{"a": 1}\n{"a": "\0"}\n', ":2: NUL byte at position 7: the file is damaged"),
    (LINES, b'{"a": 1}\n' + bytes(4096), ":2: NUL byte at position 0: the file is damaged"),
    (JSON, b'[{"a": 1},\n\n{"a": "\0"}]', ":3: NUL byte: the file is damaged"),
    (LINES, '{"a": "\ud800"}'.encode("utf-8", "surrogatepass"), r":1: not UTF-8 text \(byte 0xed at position 7\)"),
    # something else
    ([*LINES, "a.csv"], gzip.compress(b'{"a": 1}\n', mtime=0), r": the file is gzip data; rename it to end in \.gz"),
    ([*JSON, "a.csv"], b"PAR1....PAR1", ": the file is Parquet data"),
    (["a.jsonl"], b"ARROW1\0\0", ": the file is Arrow data"),
    (["a.csv"], b"PK\x03\x04xlsx", ": the file is a zip archive; unpack it"),
    (["a.jsonl"], b"\x28\xb5\x2f\xfd....", ": the file is Zstandard data"),
    (["a.json"], b"<!DOCTYPE html><html>", ": the file is a web page"),
    (
        ["a.jsonl", "a.parquet", "a.arrow", "a.csv.gz"],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        ": the file is a Git LFS pointer, not the data; run `git lfs pull`",
    ),
    # gzip
    (
        ["a.jsonl.gz"],
        gzip.compress(MANY_LINES, 0, mtime=0)[:-12],
        r":5000: the gzip file is cut short or damaged here: Comp",
    ),
    (
        ["a.json.gz"],
        gzip.compress(b'[{"a": 1},\n{"a": 2}]', mtime=0)[:-12],
        r":1: the gzip file is cut short or damaged here",
    ),
    (
        ["a.csv.gz"],
        gzip.compress(b"a,b\n1,2\n" * 9999, 0, mtime=0)[:-12],
        r":\d{4,}: the gzip file is cut short or damaged here",
    ),
    (
        ["a.jsonl.gz"],
        gzip.compress(b'{"a": 1}\n', mtime=0) + b"rest",
        ":2: the gzip file is cut short or damaged here: Not a gz",
    ),
    (["a.jsonl.gz"], b'{"a": 1}\n', ":1: the gzip file is cut short or damaged here: Not a gzipped file"),
    # nothing
    ([*JSON, *LINES, "a.csv", "a.parquet", "a.arrow"], b"", ": the file is empty"),
    ([*JSON, *LINES, "a.csv"], b"\n\n\r\n", ": the file is empty"),
    ([*JSON, *LINES], b"\n \t\n", ": the file is empty"),
    (["a.json.gz", "a.jsonl.gz", "a.csv.gz"], gzip.compress(b"", mtime=0), ": the file is empty"),
    (["a.json.gz", "a.jsonl.gz", "a.csv.gz"], b"", ": the file is empty"),
    (["a.csv"], b"a,b\r\n", ": the file is empty"),
    (JSON, b"[ ]", ": the file is empty"),
    # JSON that is broken
    (LINES, b'{"a": 1}\n{"a": }\n', r":2: broken JSON: Expecting value \(column 7\)"),
    (LINES, b'{"a": 1} {"a": 2}\n', r":1: broken JSON: Extra data \(column 10\)"),
    (
        LINES,
        b'{\n  "a": 1\n}\n',
        r":1: broken JSON.*one JSON object per line, and this object does not end on its line",
    ),
    (LINES, b'{"a": 1,\n "b": 2}\n', r":1: broken JSON.*one JSON object per line, and this object does not end"),
    (LINES, b'{"a": "b\nc"}\n', r":1: broken JSON.*one JSON object per line, and this object does not end"),
    (LINES, b'[\n  {"a": 1}\n]\n', r":1: broken JSON.*one JSON object per line\. .*end in \.json"),
    (LINES, b'[{"a": 1}, {"a": 2}]\n', r":1: expected an object.*one JSON object per line\. .*end in \.json"),
    (LINES, b'{"a": 1},\n{"a": 2}\n', r":1: broken JSON.*one JSON object per line, and text follows .*no comma"),
    (LINES, b"prompt,chosen\n", r":1: broken JSON: Expecting value \(column 1\)"),
    (JSON, b'[{"a": 1},\n {"a": }]', r":2: broken JSON: Expecting value \(column 8\)"),
    (JSON, b'[{"a": 1}\n {"a": 2}]', r":2: broken JSON: Expecting ',' delimiter \(column 2\)"),
    (JSON, b'[{"a": 1},\n]', r":2: broken JSON: Expecting value \(column 1\)"),
    (JSON, b'[{"a": 1}]\n]', r":2: broken JSON: Extra data after the array \(column 1\)"),
    (JSON, b'[{"a": 1},\n {"a": "x', r":2: broken JSON: Unterminated string.* \(column 8\)"),
    (JSON, b'[{"a": 1},\n {"a": 1', r":2: broken JSON: Expecting ',' delimiter \(column 9\): the file ends here"),
    (JSON, b'[{"a": 1},\n', r":2: broken JSON: Expecting value \(column 1\): the file ends here"),
    (JSON, b'[{"a": 1}\n', r":2: broken JSON: Expecting ',' delimiter \(column 1\): the file ends here"),
    (JSON, b'{"a": 1}\n,{"a": 2}', r":2: broken JSON: Expecting value \(column 1\)"),
    # JSON that does not hold rows
    (LINES, b'{"a": 1}\n[1]\n', ":2: expected an object with the row's columns, found an array"),
    (JSON, b'[{"a": 1},\n"b"]', ":2: expected an object with the row's columns, found a string"),
    (JSON, b'{"a": 1}\n[{"a": 2}]', ":2: expected an object with the row's columns, found an array"),
    (JSON, b'{"rows": [{"a": 1}]}\n', ": expected an array of objects, found an object; if it is a row, put .* around"),
    (JSON, b'"rows"', ": expected an array of objects, found a string"),
    (JSON, b"  12\n", ": expected an array of objects, found a number"),
    # ambiguous JSON
    (LINES, b'{"a": 1}\n' + DEEP, r":2: JSON that cannot be read: it is nested too deeply \(more than 100 levels\)"),
    (JSON, b"[%s]" % DEEP, ":1: JSON that cannot be read: it is nested too deeply"),
    (LINES, b'{"a": %s}' % (b"9" * 5000), ":1: JSON that cannot be read: a number has thousands of digits; write it"),
    (JSON, b'[{"a": 1},\n{"a": -%s}]' % (b"9" * 5000), ":2: JSON that cannot be read: a number has thousands"),
    (LINES, b'{"a": 1}\n{"a": NaN}', ":2: JSON that cannot be read: NaN is not a JSON value; write null"),
    (JSON, b'[{"a": [-Infinity]}]', ":1: JSON that cannot be read: -Infinity is not a JSON value"),
    (LINES, b'{"a": 1, "b": {"c": 1, "c": 2}}', ":1: JSON that cannot be read: the key 'c' occurs twice"),
    (JSON, b'[{"a": 1,\n"a": 1}]', ":1: JSON that cannot be read: the key 'a' occurs twice"),
    # CSV
    (["a.csv"], b"a,b\n1,2\n3\n", ":3: expected 2 cells as in the header, found 1; fill in the row"),
    (["a.csv"], b"a,b\n1,2\n3,4,5\n", ":3: expected 2 cells as in the header, found 3; put quotes around"),
    (["a.tsv"], b"a\tb\n1\t2\n3,4\n", ":3: expected 2 cells as in the header, found 1"),
    (
        ["a.csv"],
        b'a,b\n1,2\n\n3,"4\n5,6\n',
        ":4: broken CSV: .* ends inside a quoted cell",
    ),
    (["a.csv"], b'a,b\n1,"x"y\n', ":2: broken CSV: .* a closing quote is followed by text"),
    (["a.csv"], b"a,b\r1,2\r", ":1: broken CSV: .* a cell without quotes contains a carriage return"),
    (["a.csv"], b"a,b,a\n1,2,3\n", ":1: two columns are called 'a'"),
    (["a.csv"], b"\na,,b\n1,2,3\n", ":2: column 2 has no name"),
    (["a.csv"], b"a;b\n1;2\n", r":1: found one column, called 'a;b'; .* separated by ';'\? Expected commas"),
    (["a.tsv"], b"a,b\n1,2\n", ":1: found one column, called 'a,b'; .* separated by ','"),
    # Parquet and Arrow: tests/data/sources/test_sources_tables.py has more
    (["a.parquet"], b"PAR1 no", ": not a readable Parquet file: ArrowInvalid: .*; download or write it again"),
    (["a.parquet"], b'{"a": 1}\n', ": not a readable Parquet file: ArrowInvalid"),
    (["a.arrow"], b"ARROW1\0\0 no", ": not a readable Arrow file: ArrowInvalid"),
    (["a.arrow"], b'{"a": 1}\n', ": not a readable Arrow file"),
    (
        ["a.xlsx", "a", "a.jsonl.zst"],
        b"a,b\n",
        r": cannot read this kind of file; expected \.json, .*\.arrow$",
    ),
]


def read(path: Path) -> list[tuple[dict[str, Any], str]]:
    return list(read_rows(DatasetConfig(path=str(path))))


@pytest.mark.parametrize(("name", "content", "message"), [(n, c, m) for names, c, m in FAULTS for n in names])
def test_a_broken_file_is_named_with_the_line_and_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}{message}") as caught:
        read(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_rows_before_a_fault_are_given(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"a": 1}\n{"a": }'),
        ("a.json", b'[{"a": 1}, {"a": }]'),
        ("a.csv", b"a\n1\n1,2\n"),
    ):
        (tmp_path / name).write_bytes(content)
        rows = read_rows(DatasetConfig(path=str(tmp_path / name)))
        assert {name: str(value) for name, value in next(rows)[0].items()} == {"a": "1"}
        with pytest.raises(ValueError, match=name):
            next(rows)


LARGE = [
    ("a.jsonl", '{"a": 1}\n{"a": "%s"}', ":2: the line is larger than 64 MiB; are line breaks missing?"),
    ("a.json", '[{"a": 1},\n{"a": "%s"}]', ":2: the row is larger than 64 MiB"),
    ("a.json", '[{"a": 1},\n{"a": [%s0]}]', ":2: the row is larger than 64 MiB"),
    ("a.json", '{"a": 1}\n{"b": [%s0]}', ":2: the row is larger than 64 MiB"),
    ("a.csv", 'a,b\n1,2\n3,"%s"\n', ":3: the row is larger than 64 MiB; is a closing quote missing?"),
]


@pytest.mark.parametrize(("name", "content", "message"), LARGE)
def test_a_row_larger_than_its_bound_is_named(
    tmp_path: Path, name: str, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 4096)
    for module in ("files", "json_rows", "csv_rows"):
        monkeypatch.setattr(f"jdpo.data.sources.{module}.MAX_ROW_BYTES", 9000)
    filler = "0,\n" if name == "a.csv" else "0,"
    path = tmp_path / name
    path.write_text(content % (filler * 40_000))
    with pytest.raises(ValueError, match=f"^{path}{message.replace('?', '[?]')}"):
        read(path)
    path.write_text(content % (filler * 2000))
    assert len(read(path)) == 2


def test_the_bound_is_far_above_what_people_have() -> None:
    assert files.MAX_ROW_BYTES == 64 * 2**20
    assert files.TOO_LARGE == "larger than 64 MiB"


@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, 300])
def test_depth_is_bounded_whatever_python_would_take(tmp_path: Path, depth: int) -> None:
    row = '{"a": ' + '["{", ' * depth + "1" + "]" * depth + "}"
    for name, content in (("a.jsonl", row), ("a.json", f"[{row}, {row}]")):
        (tmp_path / name).write_text(content)
        if depth < MAX_DEPTH:
            assert read(tmp_path / name)[0][0] == json.loads(row)
        else:
            with pytest.raises(ValueError, match=f"{name}:1: JSON that cannot be read: it is nested too deeply"):
                read(tmp_path / name)


def test_many_brackets_that_are_not_deep_are_fine(tmp_path: Path) -> None:
    row = {"a": "[{" * 1000, "b": [[], {}] * 500}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl") == [(row, "a.jsonl:1")]


def test_half_a_surrogate_pair_and_an_escaped_nul_come_through(tmp_path: Path) -> None:
    # They are valid JSON; rows that they make unusable are counted during tokenization.
    for name, content in (
        ("a.jsonl", r'{"a": "\ud800", "b": "\u0000"}'),
        ("a.json", r'[{"a": "\ud800", "b": "\u0000"}]'),
    ):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name)[0][0] == {"a": "\ud800", "b": "\0"}


def test_types_may_differ_between_rows(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": "1", "b": None}, {"a": [True]}, {}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [raw for raw, _ in read(tmp_path / "a.jsonl")] == rows


def test_the_index_that_pandas_writes_is_a_column_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt\n0,Hi\n1,\n")
    assert [raw for raw, _ in read(tmp_path / "a.csv")] == [{"": "0", "prompt": "Hi"}, {"": "1", "prompt": None}]


def test_a_name_from_a_file_is_shown_short_and_printable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"%s": 1, "%s": 2}' % (("\u202e" * 500,) * 2), encoding="utf-8")
    with pytest.raises(ValueError, match="the key '") as caught:
        read(tmp_path / "a.jsonl")
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 200 + len(str(tmp_path))
