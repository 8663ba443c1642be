"""Processes that share a cache tokenize each row once, together; those that do not are correct as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.chunk_stream import CHUNK_ROWS
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.tokens.tokenizer import load_tokenizer
from tests.conftest import write_jsonl
from tests.integration.cluster import run_cluster
from tests.integration.stale_folders import stale_folder

HERE = Path(__file__).parent
NUM_ROWS = 4 * CHUNK_ROWS - 100


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows for four chunks, and a file with a bad row in the second chunk."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"river {i}", "chosen": " slow" * (i % 7 + 1), "rejected": " seven"} for i in range(NUM_ROWS)
    ]
    write_jsonl(tmp_path / "bad.jsonl", [*rows[: CHUNK_ROWS + 5], rows[0] | {"chosen": 7}, *rows[CHUNK_ROWS + 5 :]])
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def prepare(
    model: Path, rows: Path, folder: Path, *, count: int, hosts: int, environ: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Runs the cases of rows_by_many.py; returns the results of each process."""
    folder.mkdir()
    command = [HERE / "rows_by_many.py", model, rows, folder, hosts]
    environs = {index: environ or {} for index in range(count)}
    ends = run_cluster([command] * count, num_devices=count, environs=environs)
    assert [end.code for end in ends] == [0] * count, "\n\n".join(end.log for end in ends)
    assert not list(folder.glob("*/tokenized/.*")), "no file of a share, and no mark"
    return [json.loads((folder / f"result-{index}.json").read_text()) for index in range(count)]


def check(results: list[dict[str, Any]], model: Path, rows: Path, folder: Path, *, hosts: int) -> None:
    """Checks the results of all cases against those of this process alone."""
    alone = prepare_pairs(
        [DatasetConfig(path=str(rows))], load_tokenizer(model, chat_template=None), max_length=64, cache_dir=folder
    )
    count, total = len(results), 2 * NUM_ROWS  # a completion per side
    of_host = [sum(index % hosts == host for index in range(count)) for host in range(hosts)]
    for name, cases in {name: [result[name] for result in results] for name in results[0]}.items():
        if name == "stopped":
            assert cases == ["stopped"] * count
            continue
        if name == "bad":
            assert all(f"bad.jsonl:{CHUNK_ROWS + 6}" in error for error in cases), cases
            continue
        assert {digest for digest, _, _ in cases} == {alone.digest}, name
        texts, found = [texts for _, texts, _ in cases], [from_cache for _, _, from_cache in cases]
        if name == "shared again":
            assert (texts, found) == ([0] * count, [True] * count)
        elif name in ("shared", "shared and damaged", "after all"):
            assert (sum(texts), found) == (total, [False] * count), name
            assert max(texts) <= 2 * CHUNK_ROWS * -(-4 // count), name
        else:
            work = [index % hosts == hosts - 1 or name == "local" for index in range(count)]
            assert found == [not works for works in work], name
            assert [text > 0 for text in texts] == work, name
            for host, members in enumerate(of_host):
                mine = [text for index, text in enumerate(texts) if index % hosts == host]
                assert sum(mine) == (total if any(mine) else 0), name
                assert max(mine) <= 2 * CHUNK_ROWS * -(-4 // members), name


@pytest.mark.ci
def test_two_processes_tokenize_together_or_each_for_itself(toy_model: Path, rows: Path, tmp_path: Path) -> None:
    results = prepare(toy_model, rows, tmp_path / "work", count=2, hosts=2)
    check(results, toy_model, rows, tmp_path / "alone", hosts=2)


@pytest.mark.full
def test_four_processes_of_two_hosts_with_a_disk_each(toy_model: Path, rows: Path, tmp_path: Path) -> None:
    results = prepare(toy_model, rows, tmp_path / "work", count=4, hosts=2)
    check(results, toy_model, rows, tmp_path / "alone", hosts=2)


@pytest.mark.full
def test_clients_that_answer_from_memory(toy_model: Path, rows: Path, tmp_path: Path) -> None:
    with stale_folder(tmp_path) as environ:
        results = prepare(toy_model, rows, tmp_path / "work", count=2, hosts=1, environ=environ)
        check(results, toy_model, rows, tmp_path / "alone", hosts=1)


LOOK = """
import os, subprocess, sys
from pathlib import Path
from jdpo.processes import seen_soon

path = Path(sys.argv[1], "folder", "file")
look = lambda: path if path.exists() else None
path.parent.mkdir()
assert look() is None and os.listdir(path.parent) == []
subprocess.run(["touch", path], env={}, check=True)
assert look() is None and os.listdir(path.parent) == [], "another client has made it"
assert seen_soon(look, path.parent, patience=30) == path
assert os.listdir(path.parent) == ["file"]
"""


@pytest.mark.ci
def test_a_file_that_another_client_has_made_is_seen_soon(tmp_path: Path) -> None:
    with stale_folder(tmp_path, seconds=600) as environ:
        subprocess.run([sys.executable, "-c", LOOK, tmp_path], env={**os.environ, **environ}, check=True)
    assert {*(tmp_path / "stale.log").read_text().split()} == {str(tmp_path / "folder" / "file"), "file"}
