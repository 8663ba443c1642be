"""`jdpo iterate` with its real commands, on a toy: one round, kills at random points, and signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdpo.cli.main import main
from jdpo.file_locks import lock_file
from tests.conftest import WORDS, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


@pytest.fixture
def loop_file(toy_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes loop.yaml of a loop that prefers probable answers, and returns its path."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{first} {second}"}]} for first in WORDS[:6] for second in WORDS[:4]
    ]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)

    def write(output_dir: Path, **changes: Any) -> Path:
        values = {
            "model_name_or_path": str(toy_model),
            "prompts": str(prompts),
            "output_dir": str(output_dir),
            "rounds": 2,
            "replay": 0.3,
            "held_out": 0.25,
            "generate": {"n": 3, "max_new_tokens": 6},
            "score": {"by": "logp"},
            # Random models hardly ever end an answer.
            "pair": {"allow_cut_off": True},
            "dpo": {
                "cache_dir": str(tmp_path / "cache"),
                "max_length": 64,
                "max_steps": 3,
                "global_batch_size": 4,
                "learning_rate": 1e-3,
                "remat": "none",
                "mesh": {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1},
                "save_steps": 1,
                # With auto, a run that is started again may find that a cache pays, and its program rounds differently.
                "reference": "live",
            },
            "compare": {"by": "length"},
            **changes,
        }
        path = tmp_path / f"{output_dir.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of the stages."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def rows_of(folder: Path) -> dict[str, bytes]:
    """Returns everything that a loop has made and trained on, by name; weights by their bytes."""
    patterns = ("*.jsonl", "gen/*.gz", "gen/scores/*.jsonl", "run/model/*.safetensors")
    found = {}
    for place in sorted(folder.glob("round-*")):
        for pattern in patterns:
            found |= {str(path.relative_to(folder)): path.read_bytes() for path in place.glob(pattern)}
    return found


@pytest.mark.ci
@pytest.mark.usefixtures("one_device")
def test_one_round(loop_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loop"
    assert main(["iterate", str(loop_file(out, rounds=1))]) == 0
    printed = capfd.readouterr().out
    assert "done: " in printed.splitlines()[-1]
    result = json.loads((out / "iterate.json").read_text())
    (found,) = result["rounds"]
    assert found["done"] == ["generate", "score", "pair", "dpo", "compare"]
    assert 0 < found["pairs"] <= 18
    assert 0 <= found["compared"]["win_rate"]["value"] <= 1
    assert found["compared"]["kl"] > 0
    pairs = [json.loads(line) for line in (out / "round-000" / "pairs.jsonl").read_text().splitlines()]
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert (out / "round-000" / "run" / "model" / "config.json").is_file()
    # Done again, nothing runs.
    assert main(["iterate", str(tmp_path / "loop.yaml")]) == 0
    assert "generate" not in capfd.readouterr().out


def started(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jdpo.cli.main", "iterate", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stage_of(process: subprocess.Popen[str]) -> int | None:
    """Returns the process id of the stage that runs."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = path.read_text().split() if path.exists() else []
    return int(children[0]) if children else None


def wait_until_free(folder: Path) -> None:
    """Waits for a stage that was left alone."""
    if folder.is_dir() and (lock := lock_file(folder / ".lock", wait=True)):
        lock.close()


@pytest.mark.full
@pytest.mark.usefixtures("one_device")
def test_killed_at_random_points(loop_file: Callable[..., Path], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "loop"
    began = time.monotonic()
    assert main(["iterate", str(loop_file(whole))]) == 0
    duration = time.monotonic() - began
    rng = random.Random(0)
    path = loop_file(out)
    killed = 0
    for kill in range(KILLS):
        process = started(path)
        # As long as two stages take, so that the loop gets on.
        time.sleep(rng.uniform(0, duration / 5))
        stage = stage_of(process)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        # Every other time the stage survives the loop, as under a killer of the largest process.
        if stage is not None and kill % 2:
            os.kill(stage, signal.SIGKILL)
        wait_until_free(out)
    assert main(["iterate", str(path)]) == 0
    assert killed >= KILLS / 2
    assert rows_of(out).keys() == rows_of(whole).keys()
    for name, content in rows_of(whole).items():
        assert rows_of(out)[name] == content, name


@pytest.mark.full
@pytest.mark.usefixtures("one_device")
def test_a_signal_reaches_the_stage_and_ends_the_loop(loop_file: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "loop"
    path = loop_file(out, rounds=1)
    process = started(path)
    while not (out / "round-000" / "pairs.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    while not (out / "round-000" / "run" / "checkpoints").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "round 0: dpo ended with exit code 143" in printed
    assert main(["iterate", str(path)]) == 0
