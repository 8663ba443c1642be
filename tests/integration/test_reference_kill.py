"""`kill -9` while the reference is computed loses at most one shard, and two processes leave the files of one.

Real processes of the command line; the signal is sent by the process to itself right before a given fsync.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jdpo.cli.commands.runs import reference
from jdpo.data.reference_cache.scores import SHARD_ROWS

Words = Callable[..., list[str]]
REST = 20
NUM_ROWS = SHARD_ROWS + REST
VOCABULARY = ("river", "mountain", "paper", "winter", "green", "seven", "slow", "market")
ROOT = Path(__file__).parents[2]

KILLED = """
import os, signal, sys
from jdpo.cli.commands.runs import reference

left, fsync = int(sys.argv[1]), os.fsync

def killed_before(file):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)

os.fsync = killed_before
reference.main("reference", sys.argv[2:])
"""
RUN = "import sys; from jdpo.cli.commands.runs import reference; sys.exit(reference.main('reference', sys.argv[1:]))"

# Each file takes two fsyncs: its own and its folder's. key.json comes first, then shard, JSON, shard, JSON, ...
POINTS = {
    "key.json half written": (1, []),
    "first shard half written": (3, []),
    "first shard in place, its JSON half written": (5, []),
    "second shard half written": (7, [0]),
    "second shard in place, its JSON not": (8, [0]),
    "second JSON half written": (9, [0]),
    "second JSON in place": (10, [0, 1]),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short pairs for two shards, the second of 20 rows."""
    rng = np.random.default_rng(0)

    def turn(role: str, tail: str = "") -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choice(VOCABULARY, int(rng.integers(2, 5)))) + tail}]

    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(NUM_ROWS):
            row = {"prompt": turn("user"), "chosen": turn("assistant", " a"), "rejected": turn("assistant", " b")}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def words(run_words: Words, rows: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    return lambda name: run_words(datasets=rows, cache_dir=tmp_path / name, global_batch_size=256)


def shards(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Returns inode, time of change and content of every file under `folder` that a build leaves, by name."""
    found = {}
    for path in (folder / "reference").glob("*/*"):
        if path.suffix in (".json", ".safetensors"):
            stat = path.stat()
            found[path.name] = (stat.st_ino, stat.st_mtime_ns, path.read_bytes())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {name: file[2] for name, file in shards(folder).items()}


def assert_resumed(words: Callable[[str], list[str]], tmp_path: Path, point: str) -> None:
    """Kills a build at a point, resumes it, and compares it with an uninterrupted build."""
    nth, whole = POINTS[point]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(nth), *words("killed")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    kept = shards(tmp_path / "killed")
    assert [shard for shard in range(2) if f"{shard:05d}.json" in kept] == whole
    assert reference.main("reference", words("killed")) == 0
    after = shards(tmp_path / "killed")
    for shard in whole:
        for name in (f"{shard:05d}.json", f"{shard:05d}.safetensors"):
            assert after[name] == kept[name], "the very file that stood there"
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")
    assert not list((tmp_path / "killed" / "reference").glob("*/*.tmp"))


@pytest.mark.ci
def test_a_killed_build_computes_only_what_is_missing(
    words: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference.main("reference", words("uninterrupted")) == 0
    capsys.readouterr()
    assert_resumed(words, tmp_path, "second shard in place, its JSON not")
    printed = capsys.readouterr().out
    assert f"{REST} of {NUM_ROWS:,} training rows to compute (shards: 1 found, 1 missing)" in printed
    assert f"reference: cached, {SHARD_ROWS} rows found, {REST} computed" in printed


@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere(words: Callable[[str], list[str]], tmp_path: Path, point: str) -> None:
    assert reference.main("reference", words("uninterrupted")) == 0
    assert_resumed(words, tmp_path, point)


# --- two processes


def start_two(words: list[list[str]], *, num_devices: int = 4) -> list[str]:
    """Runs the command as two processes of one run; returns what each printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for index in range(2):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            "PYTHONPATH": str(ROOT),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN, *words[index]],
                env=os.environ | cluster,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


@pytest.mark.full
def test_two_processes_share_a_folder_or_have_one_each(words: Callable[[str], list[str]], tmp_path: Path) -> None:
    assert reference.main("reference", words("one")) == 0
    first, second = start_two([words("shared")] * 2)
    assert f"cached, 0 rows found, {NUM_ROWS} computed" in first
    assert "reference:" not in second, "one voice"
    assert contents(tmp_path / "shared").keys() == contents(tmp_path / "one").keys()
    start_two([words("left"), words("right")])
    assert contents(tmp_path / "left") == contents(tmp_path / "right") == contents(tmp_path / "shared")
    # Both hosts compute the shard that one of them lacks, and only that host writes it.
    for path in (tmp_path / "right").glob("reference/*/00001.json"):
        path.unlink()
    left, right = shards(tmp_path / "left"), shards(tmp_path / "right")
    first, _ = start_two([words("left"), words("right")])
    assert f"cached, {SHARD_ROWS} rows found, {REST} computed" in first
    assert shards(tmp_path / "left") == left
    assert contents(tmp_path / "right") == contents(tmp_path / "left")
    changed = {name for name, file in shards(tmp_path / "right").items() if file[:2] != right.get(name, ())[:2]}
    assert changed == {"00001.json", "00001.safetensors"}
    assert not list(tmp_path.glob("*/reference/*/.process*"))
