"""Rows tokenized by several processes: the same rows, the same errors, and nothing left over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared import chunk_stream
from jdpo.data.prepared.chunk_stream import CHUNK_ROWS
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.prepared.workers import IN_FLIGHT, map_in_order
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer

NUM_ROWS = 3 * CHUNK_ROWS + 100


def pairs(num_rows: int) -> list[dict[str, Any]]:
    """Returns pairs of which some are dropped or cut."""
    return [
        {
            "prompt": [{"role": "user", "content": f"The capital of {i}?"}],
            "chosen": [{"role": "assistant", "content": "" if i % 97 == 0 else "Paris" + "." * (i % 80)}],
            "rejected": [{"role": "assistant", "content": "I do not know"}],
        }
        for i in range(num_rows)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


@pytest.fixture(scope="module")
def tokenizer(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level, chat_template="chatml")


def children(process: int | None = None) -> set[int]:
    """Returns the running child processes of a process."""
    found = set()
    for task in Path(f"/proc/{process or os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            found.update(map(int, (task / "children").read_text().split()))
    return {child for child in found if "resource_tracker" not in _command(child)}


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except FileNotFoundError:
        return "resource_tracker"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_the_rows_are_the_same_to_the_byte_whatever_the_number_of_processes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    datasets = [write(tmp_path / "a.jsonl", pairs(NUM_ROWS)), write(tmp_path / "b.jsonl", pairs(300))]
    stores, told = [], []
    before = children()
    for num_proc in (1, 2):
        counted: list[int] = []
        data = prepare_pairs(
            datasets,
            tokenizer,
            max_length=64,
            cache_dir=tmp_path / f"cache{num_proc}",
            num_proc=num_proc,
            progress=lambda num_rows, total, counted=counted: counted.append(num_rows),
        )
        (arrow,) = (tmp_path / f"cache{num_proc}" / "tokenized").glob("*.arrow")
        stores.append((arrow.name, arrow.read_bytes(), data.counts, data.examples, data.digest))
        told.append(counted)
    assert stores[0] == stores[1]
    assert told[0] == told[1] == [512, 1024, 1536, 1636, 1936]
    assert stores[0][2]["dropped: empty side"] == 21
    assert children() == before


def test_an_error_is_the_same_and_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = pairs(NUM_ROWS)
    rows[CHUNK_ROWS + 9]["chosen"] = [{"role": "narrator", "content": "meanwhile"}]
    dataset = write(tmp_path / "a.jsonl", rows)
    before, messages = children(), []
    for num_proc in (1, 2):
        with pytest.raises(ValueError, match=rf"a\.jsonl:{CHUNK_ROWS + 10}.*narrator") as error:
            prepare_pairs([dataset], tokenizer, max_length=64, cache_dir=tmp_path / "cache", num_proc=num_proc)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert children() == before
    assert not list((tmp_path / "cache" / "tokenized").iterdir())


def test_few_rows_start_no_process_and_many_do(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_stream, "available_cores", lambda: 2)
    monkeypatch.setattr(chunk_stream, "ALONE_ROWS", 2 * CHUNK_ROWS)
    for num_rows, expected in ((2 * CHUNK_ROWS, False), (2 * CHUNK_ROWS + 1, True)):
        started: list[bool] = []
        data = prepare_pairs(
            [write(tmp_path / f"{num_rows}.jsonl", pairs(num_rows))],
            tokenizer,
            max_length=64,
            cache_dir=tmp_path,
            progress=lambda *counts, started=started: started.append(bool(children())),
        )
        assert started[:2] == [False, False]
        assert any(started) == expected
        assert data.counts["rows read"] == num_rows


def test_tasks_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    results = map_in_order(_plus, 5, tasks(), num_proc=2)
    assert [next(results) for _ in range(10)] == list(range(5, 15))
    assert len(read) <= 10 + 2 * IN_FLIGHT + 1
    for child in children():
        os.kill(child, signal.SIGTERM)  # as Slurm does, which means the main process
    assert [next(results) for _ in range(10)] == list(range(15, 25))
    before = len(read)
    results.close()  # type: ignore[attr-defined]
    assert len(read) == before
    assert not children()


def _plus(first: int, second: int) -> int:
    return first + second


def _die(first: int, second: int) -> int:
    os._exit(1)


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(ValueError, match="a process that tokenizes rows ended before it finished"):
        list(map_in_order(_die, 0, [1, 2, 3], num_proc=2))


# --- in scripts

SCRIPT = """
import sys
from pathlib import Path
import jax

jax.block_until_ready(jax.numpy.zeros(3) + 1)  # jax has its threads by now

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.tokens.tokenizer import load_tokenizer

folder = Path(sys.argv[1])
tokenizer = load_tokenizer(Path(sys.argv[2]), chat_template="chatml")
data = prepare_pairs(
    [DatasetConfig(path=str(folder / "a.jsonl"))], tokenizer, max_length=64, cache_dir=folder / "cache", num_proc=2,
    progress=lambda num_rows, total: print(num_rows, flush=True),
)
print("kept", len(data))
"""  # the script has no `if __name__ == "__main__"`


def run_script(folder: Path, byte_level: Path, num_rows: int) -> subprocess.Popen[str]:
    write(folder / "a.jsonl", pairs(num_rows))
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(folder), str(byte_level)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as in a terminal
        env={**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},  # such as: no torch here
    )


@pytest.mark.ci
def test_a_script_needs_no_main_guard_after_jax_has_started(byte_level: Path, tmp_path: Path) -> None:
    process = run_script(tmp_path, byte_level, NUM_ROWS)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines() == ["512", "1024", "1536", "1636", f"kept {NUM_ROWS - 17}"]


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_script_that_is_stopped(byte_level: Path, tmp_path: Path, how: signal.Signals) -> None:
    process = run_script(tmp_path, byte_level, 200_000)
    assert process.stdout is not None
    assert process.stdout.readline() == "512\n"
    workers = children(process.pid)
    assert len(workers) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal sends Ctrl-C to all its processes
        _, err = process.communicate(timeout=60)
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert err.count("Traceback") == 1, "the processes print nothing about it"
        assert not list((tmp_path / "cache" / "tokenized").iterdir())
    else:
        os.kill(process.pid, how)
        process.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
