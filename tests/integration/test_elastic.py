"""A run continues with another number of processes: the same numbers, and the same bits with the same number."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jdpo.reports.metrics_file import read_metrics
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import End, run_cluster

PROGRAM = Path(__file__).parent / "stop_by_many.py"
LAST_STEP = 12
MEASURED = ("_per_second", "_seconds", "_gib", "mfu")

Start = Callable[..., list[End]]


@pytest.fixture
def start(run_words: Callable[..., list[str]], tmp_path: Path) -> Start:
    """Starts a run in float64 of 12 steps by a number of processes of one device each, and waits for their ends."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_pairs(20))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", chat_pairs(5, seed=1))

    def run(name: str, count: int, *, stop_at: int = 0, **overrides: Any) -> list[End]:
        values = {
            "output_dir": tmp_path / name,
            "datasets": rows,
            "eval_datasets": held_out,
            "compute_dtype": "float64",
            "num_train_epochs": 4,
            "logging_steps": 5,  # every stop is in the middle of a window of metrics
            "eval_steps": 4,
            "save_steps": 100,
            "mesh.data": 1,
            "mesh.fsdp": -1,
        } | overrides
        command = [PROGRAM, stop_at, *run_words(**values)]
        return run_cluster([command] * count, num_devices=count)

    return run


def state_of(run: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the last checkpoint: weights, moments, and the rest of the state."""
    path = (run / "checkpoints" / str(LAST_STEP) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(place): array for place, array in jax.tree_util.tree_leaves_with_path(tree)}


def metrics_of(run: Path) -> list[Mapping[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.endswith(MEASURED)}
        for line in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.full
def test_four_processes_then_two_then_eight(start: Start, tmp_path: Path) -> None:
    ends = start("uninterrupted", 4)
    assert [end.code for end in ends] == [0] * 4, ends
    ends = start("run", 4, stop_at=3)
    assert [end.code for end in ends] == [143] * 4, ends
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    # Bitwise with the number of processes that it had.
    ends = start("four", 4)
    assert [end.code for end in ends] == [0] * 4, ends
    print(ends[0].log)
    # With others, the same numbers but for the order of sums.
    ends = start("run", 2, stop_at=6)
    assert [end.code for end in ends] == [143] * 2, ends
    print(ends[0].log)
    ends = start("run", 8)
    assert [end.code for end in ends] == [0] * 8, ends
    print(ends[0].log)
    expected, weights = metrics_of(tmp_path / "uninterrupted"), state_of(tmp_path / "uninterrupted")
    assert metrics_of(tmp_path / "four") == expected
    for name, array in state_of(tmp_path / "four").items():
        assert array.tobytes() == weights[name].tobytes(), name
    found = metrics_of(tmp_path / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=0, atol=1e-9)
    differences = {
        name: float(np.abs(array.astype(float) - weights[name].astype(float)).max(initial=0))
        for name, array in state_of(tmp_path / "run").items()
    }
    print("largest difference of weights", max(differences.values()))
    assert max(differences.values()) < 1e-9
