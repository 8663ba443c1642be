from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jdpo
from jdpo.config import DatasetConfig
from jdpo.data.sources import HubSource, open_source, read_rows

DEEP = b'{"a": %s%s}' % (b"[" * 200_000, b"]" * 200_000)
ROWS = [{"prompt": f"question {i}", "completion": "wörd"} for i in range(10)]


def write(path: Path, rows: list[Any] = ROWS) -> Path:
    """Writes rows as the file's name says."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    content = array if ".json." in path.name + "." and ".jsonl" not in path.name else lines
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read_rows(DatasetConfig(path=str(path), split=split)))


@pytest.mark.parametrize(
    ("name", "third_origin"),
    [
        ("pairs.jsonl", "pairs.jsonl:3"),
        ("pairs.jsonl.gz", "pairs.jsonl.gz:3"),
        ("pairs.json", "pairs.json[2]"),
        ("pairs.json.gz", "pairs.json.gz[2]"),
        ("pairs.parquet", "pairs.parquet:3"),
    ],
)
def test_every_kind_of_file_gives_the_rows_and_where_they_stand(tmp_path: Path, name: str, third_origin: str) -> None:
    rows = read(write(tmp_path / name))
    assert [raw for raw, _ in rows] == ROWS
    assert rows[2][1] == third_origin


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert read(path) == [({"a": 1}, "pairs.jsonl:1"), ({"a": 2}, "pairs.jsonl:4")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', r"a\.jsonl:2: broken JSON: Expecting value \(column 7\)"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected an object .* found an array"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8 text \(byte 0xff at position 7\)"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b'{"a": 1}\n' + DEEP, r"a\.jsonl:2: JSON that Python cannot read: it is nested too deeply"),
        ("a.jsonl", b'{"a": %s}\n' % (b"9" * 5000), r"a\.jsonl:1: JSON that Python cannot read: Exceeds the limit"),
        ("a.json", b"[%s]" % DEEP, r"a\.json: JSON that Python cannot read: it is nested too deeply"),
        ("a.json", b"  ", r"a\.json: the file is empty"),
        ("a.json", b"[]", r"a\.json: the file is empty"),
        ("a.json", b'[{"a": 1},\n {"a": }]', r"a\.json:2: broken JSON: Expecting value \(column 8\)"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"a\.json:2: broken JSON: Extra data.* goes into a \.jsonl file"),
        ("a.json", b'{"rows": []}', r"a\.json: expected an array of objects, found an object"),
        ("a.json", b'[{"a": 1}, "b"]', r"a\.json\[1\]: expected an object .* found a string"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-12], r"a\.jsonl\.gz: the gzip file is cut short"),
        ("a.jsonl.gz", b'{"a": 1}\n', r"a\.jsonl\.gz: the gzip file is cut short or damaged"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.csv", b"a,b\n", r"a\.csv: cannot read this kind of file; known endings are \.json,"),
    ],
)
def test_a_broken_file_is_named_with_the_line_and_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("path", ["missing.jsonl", "data/missing.jsonl", "missing", "/no/such/place"])
def test_a_path_that_is_nothing_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"^{path}: no such file or folder"):
        read(Path(path))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[30%:]", range(3, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[8:100]", range(8, 10)),
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
        ("train[:120%]", "split bound of 120% is more than all rows"),
        ("train[1:2", r"cannot read split 'train\[1:2': expected one like train"),
        ("train+test", "cannot read split"),
        ("test", "a file has one split, 'train', but split is 'test'"),
    ],
)
def test_a_split_that_cannot_be_is_an_error(tmp_path: Path, split: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        read(path, split)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "set" / "b.jsonl", ROWS[4:])
    write(tmp_path / "set" / "a.parquet", ROWS[:4])
    (tmp_path / "set" / "README.md").write_text("not data")
    rows = read(tmp_path / "set")
    assert [raw for raw, _ in rows] == ROWS
    assert (rows[0][1], rows[4][1]) == ("set/a.parquet:1", "set/b.jsonl:1")
    assert [raw for raw, _ in read(tmp_path / "set", "train[3:5]")] == ROWS[3:5]


def test_files_named_after_a_split_are_that_split(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:3])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[3:6])
    write(tmp_path / "test.jsonl", ROWS[6:])
    assert [raw for raw, _ in read(tmp_path)] == ROWS[:6]
    assert [raw for raw, _ in read(tmp_path, "test")] == ROWS[6:]
    with pytest.raises(ValueError, match="no split 'validation' in this folder; it has test, train"):
        read(tmp_path, "validation")


def test_a_folder_without_data_or_with_another_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data files in this folder"):
        read(tmp_path)
    write(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="no split 'test' in this folder; it has train"):
        read(tmp_path, "test")


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


def test_hub_rows_come_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "hub" / "train.jsonl").parent
    source = HubSource(DatasetConfig(path=str(folder), split="train[2:4]"))
    assert list(source.rows()) == [(ROWS[2], f"{folder}:train[2:4][0]"), (ROWS[3], f"{folder}:train[2:4][1]")]
    again = HubSource(DatasetConfig(path=str(folder), split="train[2:4]"))
    other = HubSource(DatasetConfig(path=str(folder), split="train[2:5]"))
    assert source.digest() == again.digest() != other.digest()


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
    assert "without a network, give the path of a local one" in run.stdout


@pytest.mark.parametrize("option", ["name", "revision"])
def test_options_of_hub_names_are_refused_for_files(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "rows.jsonl")
    for place, kind in ((path, "file"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=rf"{place}: {option} is 'main', but .*hub only.*local {kind}; leave"):
            open_source(DatasetConfig(path=str(place), **{option: "main"}))


def test_files_of_no_split_are_told(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "extra.jsonl", "more.parquet"):
        write(tmp_path / name)
    for split in ("train", "test", "train[:3]"):
        source = open_source(DatasetConfig(path=str(tmp_path), split=split))
        assert source.left_out == ("extra.jsonl", "more.parquet")
    assert open_source(DatasetConfig(path=str(tmp_path / "train.jsonl"))).left_out == ()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).unlink()
    assert open_source(DatasetConfig(path=str(tmp_path))).left_out == ()
