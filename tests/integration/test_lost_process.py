"""If one process of a run dies or hangs, the others end with one line and exit code 75."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.checkpoint.manager import complete_steps
from jdpo.exit_codes import LOST
from tests.integration.cluster import run_cluster, started

DPO = ("-m", "jdpo.cli.main", "dpo")


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_other_process_ends_and_says_how_to_continue(
    run_words: Callable[..., list[str]], tmp_path: Path, victim: int, signum: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = run_words(output_dir=run, num_train_epochs=2000, save_steps=2, heartbeat_timeout_seconds=8)
    with started([[*DPO, *words]] * 2) as cluster:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints").is_dir() or not complete_steps(run / "checkpoints"):
            assert time.monotonic() < deadline, cluster.logs()
            assert all(process.poll() is None for process in cluster.processes), cluster.logs()
            time.sleep(0.1)
        cluster.processes[victim].send_signal(signum)
        other = 1 - victim
        code = cluster.processes[other].wait(60)
        log = cluster.logs()[other]
        pid = cluster.processes[victim].pid
    assert code == LOST, log
    assert "Traceback" not in log
    assert "Check failure stack trace" not in log  # JAX's client prints this before it aborts
    (line,) = [line for line in log.splitlines() if line.startswith("jdpo: error: ")]
    assert log.endswith(f"{line}\n")
    assert re.match(rf"jdpo: error: process {victim} of this run \(host .*, pid {pid}\) has died", line)
    assert f"The last checkpoint is step {complete_steps(run / 'checkpoints')[-1]} " in line
    assert line.endswith(f"run the same command on every host: jdpo dpo {' '.join(words)}")
    stacks = (run / f"stacks-of-process-{other}.txt").read_text()
    assert str(run / f"stacks-of-process-{other}.txt") in line
    assert "jdpo/cli/commands/runs/train.py" in stacks  # the main thread


@pytest.mark.full
def test_a_process_that_reports_an_error_is_not_taken_for_dead() -> None:
    ends = run_cluster([[Path(__file__).parent / "fail_alone.py", 0]] * 2, timeout=100)
    assert [end.code for end in ends] == [1, 1], ends
    assert all("has died" not in end.log for end in ends)
