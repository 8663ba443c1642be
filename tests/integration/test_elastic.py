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


def ended(ends: list[End], code: int) -> None:
    assert {end.code for end in ends} == {code}, "\n\n".join(end.log for end in ends)


@pytest.mark.full
def test_four_processes_then_two_then_eight(start: Start, tmp_path: Path) -> None:
    ended(start("uninterrupted", 4), 0)
    ended(start("run", 4, stop_at=3), 143)
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    ended(start("four", 4), 0)
    ended(start("run", 2, stop_at=6), 143)
    # A batch of eight does not split over three devices: refused, and the run stays as it is.
    refused = start("run", 3)
    ended(refused, 1)
    assert all("use a multiple of 3" in end.log for end in refused)
    ended(start("run", 8), 0)
    expected, state = metrics_of(tmp_path / "uninterrupted"), state_of(tmp_path / "uninterrupted")
    assert len(state) > 30, "params and two moments of each"
    # With the number of processes that it had: the same bits.
    assert metrics_of(tmp_path / "four") == expected
    for name, array in state_of(tmp_path / "four").items():
        assert array.tobytes() == state[name].tobytes(), name
    # With others: the same numbers, except for the order in which they are summed.
    found = metrics_of(tmp_path / "run")
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=0, atol=1e-9)
    for name, array in state_of(tmp_path / "run").items():
        np.testing.assert_allclose(array, state[name], rtol=0, atol=1e-9, err_msg=name)
