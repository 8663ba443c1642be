"""Two processes on loopback stand for two hosts: one run, one set of files, the same numbers as one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jdpo.reports.writers import read_metrics


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(words: list[str], *, index: int, count: int, port: int) -> subprocess.Popen[str]:
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jdpo.cli.main", "dpo", *words],
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}", **cluster},
        stderr=subprocess.PIPE,
        text=True,
    )


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
        port = free_port()
        processes = [start(words[count], index=index, count=count, port=port) for index in range(count)]
        logs[count] = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, logs[count]
    one, two = (read_metrics(tmp_path / f"processes_{count}" / "metrics.jsonl") for count in (1, 2))
    assert len(one) == len(two) == 7
    for line, other in zip(one, two, strict=True):
        names = [name for name in line if not name.endswith(("per_second", "_seconds", "_gib"))]
        np.testing.assert_allclose([line[n] for n in names], [other[n] for n in names], rtol=3e-5, atol=1e-6)
    assert "done: model in" in logs[2][0]
    assert "done: model in" not in logs[2][1]  # one voice
    # A resumed run of two finds itself finished.
    port = free_port()
    processes = [start(words[2], index=index, count=2, port=port) for index in range(2)]
    assert "is finished" in processes[0].communicate(timeout=300)[1]
    processes[1].communicate(timeout=300)
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.full
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    run_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = run_words(output_dir=run, num_train_epochs=2000, save_steps=10000, **{"mesh.data": 2, "mesh.fsdp": 4})
    port = free_port()
    processes = [start(words, index=index, count=2, port=port) for index in range(2)]
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 5:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], logs
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped by a signal; step {last} is saved" in logs[0]
    assert (run / "checkpoints" / str(last) / "manifest.json").exists()
