"""Two processes on loopback represent two hosts: one run, one set of files, the same numbers as one process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jdpo.reports.metrics_file import read_metrics
from tests.integration.cluster import run_cluster, started

DPO = ("-m", "jdpo.cli.main", "dpo")


@pytest.mark.full
def test_two_processes_train_as_one(run_words: Callable[..., list[str]], pairs_file: Path, tmp_path: Path) -> None:
    words = {
        count: run_words(
            output_dir=tmp_path / f"processes_{count}",
            num_train_epochs=2,
            eval_datasets=pairs_file,
            save_steps=2,
            **{"mesh.data": 2, "mesh.fsdp": 4},
        )
        for count in (1, 2)
    }
    logs = {}
    for count in (1, 2):
        ends = run_cluster([[*DPO, *words[count]]] * count)
        assert [end.code for end in ends] == [0] * count, ends
        logs[count] = [end.log for end in ends]
    one, two = (read_metrics(tmp_path / f"processes_{count}" / "metrics.jsonl") for count in (1, 2))
    assert len(one) == len(two) == 8  # six steps, and evaluations before the first and after the last
    for line, other in zip(one, two, strict=True):
        names = [name for name in line if not name.endswith(("per_second", "_seconds", "_gib"))]
        np.testing.assert_allclose([line[n] for n in names], [other[n] for n in names], rtol=3e-5, atol=1e-6)
    assert "done: model in" in logs[2][0]
    assert "done: model in" not in logs[2][1]  # only one process logs
    # Started again, the run of two processes is finished.
    ends = run_cluster([[*DPO, *words[2]]] * 2)
    assert [end.code for end in ends] == [0, 0], ends
    assert "is finished" in ends[0].log


@pytest.mark.full
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    run_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = run_words(output_dir=run, num_train_epochs=2000, save_steps=10000, **{"mesh.data": 2, "mesh.fsdp": 4})
    with started([[*DPO, *words]] * 2) as cluster:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 5:
            assert time.monotonic() < deadline, cluster.logs()
            assert all(process.poll() is None for process in cluster.processes), cluster.logs()
            time.sleep(0.2)
        cluster.processes[1].send_signal(signal.SIGTERM)
        ends = cluster.wait(100)
    assert [end.code for end in ends] == [143, 143], ends
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped by a signal; step {last} is saved" in ends[0].log
    assert (run / "checkpoints" / str(last) / "manifest.json").exists()
