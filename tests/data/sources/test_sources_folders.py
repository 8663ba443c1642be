"""The files that are read of a folder: splits, saved datasets, and other files in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jdpo
from jdpo.config import DatasetConfig
from jdpo.data.sources import open_source, read_rows

ROWS = [{"prompt": f"question {i}", "completion": "words"} for i in range(10)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read_rows(DatasetConfig(path=str(path), split=split)))


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


def test_files_outside_every_split_are_reported(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "extra.jsonl", "more.parquet"):
        write(tmp_path / name)
    for split in ("train", "test", "train[:3]"):
        source = open_source(DatasetConfig(path=str(tmp_path), split=split))
        assert source.left_out == ("extra.jsonl", "more.parquet")
    assert open_source(DatasetConfig(path=str(tmp_path / "train.jsonl"))).left_out == ()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).unlink()
    assert open_source(DatasetConfig(path=str(tmp_path))).left_out == ()


@pytest.mark.parametrize(
    ("names", "split", "chosen", "left_out"),
    [
        (["train_1.jsonl", "train_2.jsonl", "test.jsonl"], "train", [0, 1], []),
        (["train-00000-of-00001-8e8c4c4a2d16c9ee.parquet", "dev.part3.jsonl"], "dev", [1], []),
        (["train_prefs-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"], "train_prefs", [0], []),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train", [0], []),
        (["train.jsonl", "train_extra.jsonl", "test_extra.jsonl"], "train", [0], ["train_extra.jsonl"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "test", [1], []),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", [0, 1], []),
        (["data/train/a.jsonl", "data/test/a.jsonl"], "test", [1], []),
        (["testimonials.jsonl", "training.jsonl"], "train", [0, 1], []),
        (["helpful.jsonl", "harmless.jsonl"], "harmless", [1], ["helpful.jsonl"]),
        (["rows.parquet/part-00000-ab.parquet", "rows.parquet/part-00001-ab.parquet"], "train", [0, 1], []),
        (["rows.jsonl", ".rows.jsonl", "dataset_infos.json"], "train", [0], [".rows.jsonl", "dataset_infos.json"]),
    ],
)
def test_the_files_of_a_split(
    tmp_path: Path, names: list[str], split: str, chosen: list[int], left_out: list[str]
) -> None:
    for index, name in enumerate(names):
        write(tmp_path / name, [{"file": index}])
    source = open_source(DatasetConfig(path=str(tmp_path), split=split))
    assert [raw["file"] for raw, _ in source.rows()] == chosen
    assert list(source.left_out) == left_out
    assert [origin for _, origin in source.rows()] == [f"{tmp_path.name}/{names[index]}:1" for index in chosen]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["train_sft.jsonl", "train_prefs.jsonl"], "train", "split 'train' could be train_prefs or train_sft in this"),
        (["train_sft.jsonl", "test_sft.jsonl"], "dev", "no split 'dev' in this folder; it has test_sft, train_sft"),
        (["a.jsonl", "a.parquet"], "train", "a.jsonl and a.parquet look like the same rows in two formats"),
        (["train.jsonl", "train.ndjson", "test.csv"], "train", "train.jsonl and train.ndjson look like the same rows"),
        ([".hidden.jsonl"], "train", "no data files in this folder"),
        ([".cache/rows.jsonl"], "train", "no data files in this folder"),
        (["a/b/c/rows.jsonl"], "train", "no data files in this folder"),
    ],
)
def test_a_folder_with_two_readings_or_none_is_an_error(
    tmp_path: Path, names: list[str], split: str, message: str
) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path}: {message}"):
        read(tmp_path, split)


def test_an_empty_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}/b.jsonl: the file is empty"):
        read(tmp_path)


def test_a_link_to_nothing_is_named_with_where_it_leads(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl")
    link = tmp_path / "set" / "b.jsonl"
    link.symlink_to(tmp_path / "gone.jsonl")
    for path in (link, link.parent):
        with pytest.raises(ValueError, match=rf"^{link}: broken symlink: .*/gone\.jsonl does not exist"):
            read(path)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ValueError, match=f"^{link}: cannot read it: Too many levels of symbolic links"):
        read(link)
    link.unlink()
    (link.parent / "notes.md").symlink_to("gone.md")  # a broken link that is not a data file is ignored
    assert len(read(link.parent)) == 10


def test_a_link_to_a_file_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").symlink_to(write(tmp_path / "a" / "rows.jsonl"))
    assert read(tmp_path / "b.jsonl")[0] == (ROWS[0], "b.jsonl:1")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match="neither a file nor a folder, but a pipe"):
            read(path)


def test_a_file_without_read_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "shut" / "rows.jsonl")
    user = os.geteuid()
    os.chmod(tmp_path.parent, 0o755)
    if user == 0:  # root may read everything, so the test runs as user "nobody" for a while
        os.seteuid(65534)
    try:
        os.stat(tmp_path)
        reachable = True
    except PermissionError:
        reachable = False
    finally:
        os.seteuid(user)
    path.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        message = f"^{path}: cannot read the file: Permission denied" if reachable else "Permission denied"
        with pytest.raises(ValueError, match=message):
            read(path)
        os.seteuid(user)
        path.parent.chmod(0)
        if user == 0:
            os.seteuid(65534)
        for target in (path, path.parent):
            with pytest.raises(ValueError, match=f"^{target}: cannot .*: Permission denied"):
                read(target)
    finally:
        os.seteuid(user)
        path.parent.chmod(0o755)


# --- datasets.save_to_disk


def save(path: Path, splits: tuple[str, ...] = ()) -> Path:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    saved = (
        datasets.DatasetDict({name: whole.select(range(i, 10)) for i, name in enumerate(splits)}) if splits else whole
    )
    saved.save_to_disk(path, **({} if splits else {"num_shards": 3}))
    return path


def test_a_saved_dataset_is_read_from_its_files(tmp_path: Path) -> None:
    rows = read(save(tmp_path / "saved"))
    assert [raw for raw, _ in rows] == ROWS
    assert rows[-1][1] == "saved/data-00002-of-00003.arrow:3"
    assert [raw for raw, _ in read(tmp_path / "saved", "train[-2:]")] == ROWS[-2:]
    with pytest.raises(ValueError, match="no split 'test' in this folder; it has train"):
        read(tmp_path / "saved", "test")


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    save(tmp_path / "saved", ("train", "test"))
    assert [raw for raw, _ in read(tmp_path / "saved")] == ROWS
    assert read(tmp_path / "saved", "test")[0] == (ROWS[1], "saved/test/data-00000-of-00001.arrow:1")
    assert [raw for raw, _ in read(tmp_path / "saved" / "test")] == ROWS[1:]
    with pytest.raises(ValueError, match="no split 'dev' in this folder; it has train, test"):
        read(tmp_path / "saved", "dev")


def test_a_saved_split_is_found_by_its_name_and_as_train(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", "test") == read(tmp_path / "saved", "train")
    with pytest.raises(ValueError, match="no split 'dev' in this folder; it has test"):
        read(tmp_path / "saved", "dev")


def test_an_incomplete_saved_dataset_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    state = json.loads((folder / "state.json").read_text())
    for content, message in (
        ({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}, "an old version of `datasets`"),
        ({**state, "_data_files": [{"filename": 3}]}, "it should name Arrow files"),
        ({**state, "_data_files": None}, "does not write it so"),
        (["state"], "does not write it so"),
    ):
        (folder / "state.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{folder}/state\.json: .*{message}"):
            read(folder)
    (folder / "state.json").write_text(json.dumps(state)[:-9])
    with pytest.raises(ValueError, match=rf"{folder}/state\.json: the file is damaged"):
        read(folder)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow: no such file"):
        read(folder)


def test_a_folder_here_may_be_called_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a::b" / "rows.jsonl")
    assert [raw for raw, _ in read(Path("a::b"))] == ROWS


def test_opening_loads_no_library_before_a_file_needs_it() -> None:
    program = (
        "import sys, jdpo.data.sources\n"
        "print([name for name in ('pyarrow', 'fsspec', 'datasets', 'pandas', 'numpy') if name in sys.modules])\n"
    )
    root = str(Path(jdpo.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert run.stdout == "[]\n", run.stdout + run.stderr
