"""A run that is long enough to be stopped at many moments, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from tests.run_stops import SignalAt

HERE = Path(__file__).parent
LAST_STEP = 12
STOPPED_AT = 9  # between two saves, in the middle of a window of metrics, after an evaluation
WORDS = ("river", "mountain", "paper", "winter", "green", "seven", "slow", "market")
TIME_KEYS = ("_per_second", "_seconds", "_gib", "mfu")

Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def cut_words(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Returns the command-line words of a run of 12 steps in 4 shuffled epochs of 8, 8 and 4 pairs.

    It saves after every 2nd step, evaluates after every 3rd and logs after every 5th, so that every checkpoint
    but the last holds a half-filled window of metrics.
    """
    folder = tmp_path_factory.mktemp("cut")
    rng = np.random.default_rng(0)

    def turn(role: str, tail: str = "") -> list[dict[str, str]]:
        words = rng.choice(WORDS, int(rng.integers(3, 12)))
        return [{"role": role, "content": " ".join(words) + tail}]

    for name, num_rows in (("pairs", 20), ("held_out", 6)):
        rows = [
            {"prompt": turn("user"), "chosen": turn("assistant", " a"), "rejected": turn("assistant", " b")}
            for _ in range(num_rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def words(output_dir: Path, **overrides: Any) -> list[str]:
        values = {
            "model_name_or_path": toy_model,
            "datasets": folder / "pairs.jsonl",
            "eval_datasets": folder / "held_out.jsonl",
            "output_dir": output_dir,
            "cache_dir": folder / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "num_train_epochs": 4,
            "learning_rate": 1e-3,
            "logging_steps": 5,
            "eval_steps": 3,
            "save_steps": 2,
            "save_total_limit": 2,
            "remat": "none",
            "mesh.fsdp": 8,
        } | overrides
        return ["dpo", *(f"{key}={value}" for key, value in values.items())]

    return words


@pytest.fixture(scope="session")
def uninterrupted(cut_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of an uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(cut_words(output_dir)) == 0
    return output_dir


@pytest.fixture(scope="session")
def stopped(cut_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGTERM stopped at step 9; tests use copies of it."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"

    result = train(load_config(DPOConfig, None, cut_words(output_dir)[1:]), callbacks=[SignalAt(STOPPED_AT)])
    assert (result.step, result.interrupted, result.exit_code) == (STOPPED_AT, True, 143)
    return output_dir


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """A copy of a run that SIGTERM stopped at step 9."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(scope="session")
def same_run() -> Callable[[Path, Path], None]:
    """Asserts that two output_dirs hold the same results, bitwise except for times and the name of output_dir."""

    def compare(found: Path, expected: Path) -> None:
        assert _metrics(found) == _metrics(expected)
        assert _position(found) == _position(expected)
        _assert_equal_trees(_state(found), _state(expected))
        files = {path.name: path.read_bytes() for path in (expected / "model").iterdir() if path.name != "README.md"}
        assert any(name.endswith(".safetensors") for name in files)
        for name, content in files.items():
            assert (found / "model" / name).read_bytes() == content, name

    return compare


def _metrics(output_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines
    return [{key: value for key, value in line.items() if not key.endswith(TIME_KEYS)} for line in lines]


def _position(output_dir: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        position: dict[str, Any] = checkpointer.restore(output_dir / "checkpoints" / str(LAST_STEP) / "position")
    assert position["step"] == LAST_STEP
    return {key: value for key, value in position.items() if key not in ("config", "unevaluated")}


def _state(output_dir: Path) -> Any:
    path = (output_dir / "checkpoints" / str(LAST_STEP) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _assert_equal_trees(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    assert len(leaves) > 30, "params and two moments of each"
    for (path, wanted), value in zip(leaves, jax.tree.leaves(found), strict=True):
        assert value.dtype == wanted.dtype, path
        assert value.tobytes() == wanted.tobytes(), path


@pytest.fixture
def jdpo_process() -> Callable[..., subprocess.Popen[str]]:
    """Starts `jdpo WORDS` as a process on eight devices; with `point`, one that sends itself a signal there."""

    def start(words: list[str], *point: object) -> subprocess.Popen[str]:
        program = [str(HERE / "kill_point.py"), *map(str, point), "--"] if point else ["-m", "jdpo.cli.main"]
        return subprocess.Popen(
            [sys.executable, *program, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        )

    return start
