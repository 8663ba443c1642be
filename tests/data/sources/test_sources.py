from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jdpo
from jdpo.config import DatasetConfig
from jdpo.data.sources import READERS, HubSource, json_rows, open_source, read_rows
from jdpo.data.sources.readers import ending_of
from jdpo.safe_text import terminal

ROWS = [{"prompt": f"question {i}", "completion": 'wörd, "quoted"\nline'} for i in range(10)]


def text_of(name: str, rows: list[dict[str, Any]]) -> str:
    if ".csv" in name or ".tsv" in name:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if ".csv" in name else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()
    if name.endswith((".json", ".json.gz")):
        return json.dumps(rows, ensure_ascii=False, indent=1)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Writes rows in the format of the file's ending; `.stream.arrow` is an Arrow stream, `.arrow` an Arrow file."""
    name = path.name.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
    elif path.suffix == ".arrow":
        opener = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
        with opener(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        content = text_of(name, rows).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path: Path, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read_rows(DatasetConfig(path=str(path), split=split)))


KINDS = [
    ("pairs.jsonl", "pairs.jsonl:3"),
    ("pairs.jsonl.gz", "pairs.jsonl.gz:3"),
    ("pairs.ndjson", "pairs.ndjson:3"),
    ("pairs.ndjson.gz", "pairs.ndjson.gz:3"),
    ("pairs.json", "pairs.json[2]"),
    ("pairs.json.gz", "pairs.json.gz[2]"),
    ("pairs.csv", "pairs.csv:6"),
    ("pairs.csv.gz", "pairs.csv.gz:6"),
    ("pairs.tsv", "pairs.tsv:6"),
    ("PAIRS.TSV.GZ", "PAIRS.TSV.GZ:6"),
    ("pairs.parquet", "pairs.parquet:3"),
    ("pairs.arrow", "pairs.arrow:3"),
    ("pairs.stream.arrow", "pairs.stream.arrow:3"),
]


def test_every_file_ending_is_tested() -> None:
    assert {ending_of(name) for name, _ in KINDS} == set(READERS)


@pytest.mark.parametrize(("name", "third_origin"), KINDS)
def test_every_kind_of_file_gives_the_rows_and_their_origins(tmp_path: Path, name: str, third_origin: str) -> None:
    rows = read(write(tmp_path / name))
    assert [raw for raw, _ in rows] == ROWS
    assert rows[2][1] == third_origin
    # Percentages need the number of rows, which must be counted correctly.
    assert [raw for raw, _ in read(tmp_path / name, "train[-3:]")] == ROWS[-3:]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert read(path) == [({"a": 1}, "pairs.jsonl:1"), ({"a": 2}, "pairs.jsonl:4")]
    assert read(path, "train[-1:]") == [({"a": 2}, "pairs.jsonl:4")]
    path = tmp_path / "pairs.json"
    path.write_bytes(b'\xef\xbb\xbf [{"a": 1},\n\n {"a": 2}]\n\n')
    assert read(path) == [({"a": 1}, "pairs.json[0]"), ({"a": 2}, "pairs.json[1]")]
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n\r\n1,\r\n2,x\r\n")
    assert read(path) == [({"a": "1", "b": None}, "pairs.csv:3"), ({"a": "2", "b": "x"}, "pairs.csv:4")]
    assert read(path, "train[-1:]") == [({"a": "2", "b": "x"}, "pairs.csv:4")]


def test_a_json_file_may_hold_objects_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('{"a": 1}\n{"a":\n 2} {"a": 3}')
    assert read(path) == [({"a": 1}, "pairs.json:1"), ({"a": 2}, "pairs.json:2"), ({"a": 3}, "pairs.json:3")]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10**6])
def test_an_array_is_read_the_same_whatever_part_of_it_is_in_memory(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    rows = [{"text": 'a "quoted" \\ word\n', "n": [1, -2.5e3, None, True, {"deep": "\u00e9\U0001f600"}]}, {"é": {}}] * 3
    for indent, ascii_only in ((None, True), (2, False)):
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert [raw for raw, _ in read(path)] == rows
    path.write_text('[{"a": 1},\n\n  {"a": 1,\n "b": 1.5x}]')
    with pytest.raises(ValueError, match=r"pairs\.json:4: broken JSON: Expecting ',' delimiter"):
        read(path)


def test_one_row_of_an_array_is_in_memory_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    row = json.dumps({"prompt": "x" * 2**20})
    path.write_text(f"[{', '.join([row] * 64)}]")
    tracemalloc.start()
    try:
        assert sum(len(raw["prompt"]) for raw, _ in read_rows(DatasetConfig(path=str(path)))) == 2**26
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet", "pairs.arrow"])
def test_a_row_of_a_hundred_thousand_tokens_is_a_row(tmp_path: Path, name: str) -> None:
    row = {"prompt": "several words " * 50_000, "completion": "x"}
    assert [raw for raw, _ in read(write(tmp_path / name, [row, *ROWS]))] == [row, *ROWS]


@pytest.mark.parametrize("path", ["missing.jsonl", "data/missing.jsonl", "missing", "/no/such/place", "a\0b"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder") as error:
        read(Path(path))
    assert str(error.value).startswith(f"{terminal(path)}: no such file")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[30%:]", range(3, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[8:100]", range(8, 10)),
        ("train[8:999999999999999999]", range(8, 10)),
        ("train[-3:]", range(7, 10)),
        ("train[-20%:]", range(8, 10)),
        ("train[ :-9 ]", range(1)),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_slices_are_those_of_datasets(tmp_path: Path, name: str, split: str, expected: range) -> None:
    assert [raw for raw, _ in read(write(tmp_path / name), split)] == [ROWS[i] for i in expected]


@given(num_rows=st.integers(1, 40), percent=st.integers(0, 100))
def test_two_sides_of_a_percentage_partition(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, percent: int
) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"row": i} for i in range(num_rows)])

    def selected(split: str) -> list[int]:
        with contextlib.suppress(ValueError):  # a side without rows is an error of its own
            return [raw["row"] for raw, _ in read(path, split)]
        return []

    first, second = selected(f"train[:{percent}%]"), selected(f"train[{percent}%:]")
    assert first + second == list(range(num_rows))
    assert len(first) == round(num_rows * percent / 100)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[5:2]", r"rows\.jsonl: split train\[5:2\] selects no rows"),
        ("train[50:]", r"rows\.jsonl: split train\[50:\] selects no rows"),
        ("train[:120%]", r"cannot read split 'train\[:120%\]': 120% is more than 100 %"),
        ("train[1:2", r"cannot read split 'train\[1:2': expected one like train"),
        ("train+test", "cannot read split"),
        ("test", "a file has one split, 'train', but split is 'test'"),
    ],
)
def test_an_invalid_split_is_an_error(tmp_path: Path, split: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        read(path, split)


def test_the_digest_follows_content_split_and_name(tmp_path: Path) -> None:
    def digest(path: Path, split: str = "train") -> str:
        return open_source(DatasetConfig(path=str(path), split=split)).digest()

    path = write(tmp_path / "a" / "rows.jsonl")
    same = write(tmp_path / "b" / "rows.jsonl")
    others = [
        digest(write(tmp_path / "c" / "rows.jsonl", ROWS[1:])),
        digest(write(tmp_path / "c" / "other.jsonl")),
        digest(path, "train[:5]"),
    ]
    assert digest(path) == digest(same)
    assert len({digest(path), *others}) == 4


def test_parts_are_the_files_with_digests_of_their_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:5]), write(tmp_path / "b.parquet", ROWS[5:])
    before = open_source(DatasetConfig(path=str(tmp_path))).file_digests()
    assert before[str(first)] == hashlib.sha256(first.read_bytes()).hexdigest()
    write(second, ROWS[6:])
    after = open_source(DatasetConfig(path=str(tmp_path))).file_digests()
    assert list(before) == list(after) == [str(first), str(second)]
    assert [name for name in before if before[name] != after[name]] == [str(second)]
    assert open_source(DatasetConfig(path=str(first))).file_digests() == {str(first): before[str(first)]}
    for index in range(201):
        write(tmp_path / "many" / f"{index}.jsonl", ROWS[:1])
    many = open_source(DatasetConfig(path=str(tmp_path / "many")))
    assert many.file_digests() == {str(tmp_path / "many"): many.digest()}


def test_hub_rows_come_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "hub" / "train.jsonl").parent
    source = HubSource(DatasetConfig(path=str(folder), split="train[2:4]"))
    assert list(source.rows()) == [(ROWS[2], f"{folder}:train[2:4][0]"), (ROWS[3], f"{folder}:train[2:4][1]")]
    again = HubSource(DatasetConfig(path=str(folder), split="train[2:4]"))
    other = HubSource(DatasetConfig(path=str(folder), split="train[2:5]"))
    assert source.digest() == again.digest() != other.digest()
    assert source.file_digests() == {f"{folder}:train[2:4]": source.digest()}


def test_a_hub_out_of_reach_is_named_with_the_way_out(tmp_path: Path) -> None:
    program = (
        "from jdpo.config import DatasetConfig\n"
        "from jdpo.data.sources import read_rows\n"
        "try: next(read_rows(DatasetConfig(path='org/name')))\n"
        "except ValueError as error: print(error)\n"
    )
    root = str(Path(jdpo.__file__).parents[1])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "cannot load org/name:train from the hub" in run.stdout, run.stderr
    assert "without a network, give a local path" in run.stdout


@pytest.mark.parametrize("option", ["name", "revision"])
def test_options_of_hub_names_are_refused_for_files(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "rows.jsonl")
    for place, kind in ((path, "file"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=rf"{place}: {option} is 'main', but .*hub only.*local {kind}"):
            open_source(DatasetConfig(path=str(place), **{option: "main"}))
