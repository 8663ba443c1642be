"""`jdpo launch slurm` on a real Slurm: tasks join, a stopped job saves, is requeued and ends in the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.cli.main import main
from jdpo.exit_codes import LOST, PREEMPTED, USAGE
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import XLA_FLAGS
from tests.launch.conftest import Fake
from tests.launch.slurm_cluster import SlurmCluster, slurm_cluster, why_not

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

NUM_STEPS = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as running:
        yield running


class Job:
    """A job that `jdpo launch slurm` has submitted."""

    def __init__(self, cluster: SlurmCluster, number: str, folder: Path) -> None:
        self._cluster, self.number, self._folder = cluster, number, folder

    def reach(self, step: int, start: int = 1) -> None:
        """Waits until the run has done a step in its first, second, ... start."""
        self._cluster.wait(
            lambda: self.restarts >= start - 1 and any(row.get("step", 0) >= step for row in self.metrics()),
            f"step {step} of start {start}: {self.log()}",
        )

    def end(self) -> str:
        """Waits until the job has ended; returns its state."""
        return self._cluster.wait_for_state(self.number, "COMPLETED", "FAILED", "CANCELLED")["JobState"]

    @property
    def restarts(self) -> int:
        return int(self._cluster.job(self.number)["Restarts"])

    def scancel(self, *words: str) -> None:
        self._cluster.ask("scancel", *words, self.number)

    def processes(self) -> list[int]:
        """Returns the process ids of the tasks, in order."""
        rows = [row.split() for row in self._cluster.ask("scontrol", "listpids", f"{self.number}.0").splitlines()[1:]]
        return [int(pid) for _, pid in sorted((int(row[4]), row[0]) for row in rows if row[4].isdigit())]

    def metrics(self) -> list[dict[str, Any]]:
        path = self._folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self) -> str:
        """Returns what the batch script and all tasks have printed."""
        return "".join(path.read_text() for path in sorted((self._folder / "launch").glob(f"*-{self.number}*")))

    def weights(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self._folder / "model").glob("*.safetensors"))}


Submit = Callable[..., Job]


@pytest.fixture
def submit(
    cluster: SlurmCluster,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Submit:
    """Launches a run of NUM_STEPS steps on CPU with some tasks; keyword arguments override its keys."""
    flags = {"xla_force_host_platform_device_count": 1, **XLA_FLAGS}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in flags.items()))
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(Path(jdpo.__file__).parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(16, words=(6, 7)))

    def launch(name: str, num_tasks: int, options: Sequence[str] = (), **overrides: Any) -> Job:
        values = {
            "model_name_or_path": str(toy_model),
            "datasets": str(pairs),
            "output_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 64,
            "global_batch_size": 8,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 10 * NUM_STEPS,
            "remat": "none",
            "reference": "live",
            "mesh": {"data": num_tasks // 2, "fsdp": 2},
            "heartbeat_timeout_seconds": 10,
        } | overrides
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps(values))  # which is YAML as well
        machine = ["--on", f"h100x{num_tasks}", "--tasks_per_node", str(num_tasks)]
        assert main(["launch", "slurm", str(config), *machine, *options]) == 0
        number = re.search(r"Submitted batch job (\d+)", capfd.readouterr().out)
        assert number is not None
        return Job(cluster, number[1], tmp_path / name)

    return launch


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_a_stopped_job_saves_is_requeued_and_ends_in_the_bits_of_one_that_ran_through(
    submit: Submit, num_tasks: int
) -> None:
    whole = submit("whole", num_tasks, options=["--doctor"])
    assert whole.end() == "COMPLETED", whole.log()
    assert "jdpo doctor: all is well" in whole.log()
    assert f"Slurm: process {num_tasks - 1} of {num_tasks}" in whole.log()
    assert whole.restarts == 0

    stopped = submit("stopped", num_tasks)
    stopped.reach(5)
    stopped.scancel("--signal=TERM")
    assert stopped.end() == "COMPLETED", stopped.log()
    assert stopped.restarts == 1
    assert f"exit code {PREEMPTED}: requeued" in stopped.log()
    assert stopped.log().count(f"process {num_tasks - 1} of {num_tasks}") == 2
    assert whole.weights() == stopped.weights()
    assert [row.get("loss") for row in whole.metrics()] == [row.get("loss") for row in stopped.metrics()]


# Ends as a run does that has saved, and finishes in its second start.
PATIENT = """#!/bin/bash
trap 'exit 143' TERM
[[ ! -e started-$SLURM_PROCID ]] || exit 0
touch "started-$SLURM_PROCID"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("reason", ["time limit", "preemption"])
def test_slurm_itself_lets_the_tasks_save_and_the_job_is_requeued(
    cluster: SlurmCluster, submit: Submit, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    fake("jdpo", PATIENT)
    monkeypatch.chdir(tmp_path)
    # Slurm looks at time limits twice a minute, and ends a job up to a minute after its limit.
    job = submit("patient", 2, options=["--time", "1", "--grace_seconds", "45"] if reason == "time limit" else [])
    if reason == "preemption":
        cluster.wait((tmp_path / "started-1").exists, "the tasks run")
        cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert job.end() == "COMPLETED", job.log()
    assert job.restarts == 1
    assert f"exit code {PREEMPTED}: requeued" in job.log()


def test_a_job_that_may_not_be_requeued_ends_after_its_save(
    cluster: SlurmCluster, submit: Submit, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("jdpo", PATIENT)
    monkeypatch.chdir(tmp_path)
    job = submit("patient", 2)
    cluster.wait((tmp_path / "started-1").exists, "the tasks run")
    cluster.ask("scontrol", "update", f"job={job.number}", "requeue=0")
    job.scancel("--signal=TERM")
    assert job.end() == "FAILED", job.log()
    assert f"exit code {PREEMPTED}, and Slurm does not requeue it" in job.log()


def test_a_job_with_a_killed_task_is_requeued(submit: Submit) -> None:
    job = submit("killed", 2)
    job.reach(5)
    os.kill(job.processes()[1], signal.SIGKILL)
    assert job.end() == "COMPLETED", job.log()
    assert job.restarts == 1
    assert re.search(f"exit code ({LOST}|137): requeued", job.log())


def test_an_error_of_the_run_ends_the_job(submit: Submit) -> None:
    job = submit("wrong", 2, datasets="absent.jsonl")
    assert job.end() == "FAILED", job.log()
    assert f"ended with exit code {USAGE}" in job.log()
    assert job.restarts == 0


def test_a_job_that_the_user_cancels_saves_and_is_not_requeued(submit: Submit, tmp_path: Path) -> None:
    job = submit("cancelled", 2)
    job.reach(5)
    job.scancel()
    assert job.end() == "CANCELLED"
    assert job.restarts == 0
    assert any((tmp_path / "cancelled" / "checkpoints").iterdir()), job.log()


def test_a_signal_for_the_batch_script_alone_reaches_the_tasks_once(submit: Submit) -> None:
    job = submit("batch", 2)
    job.reach(5)
    job.scancel("--batch", "--signal=TERM")
    assert job.end() == "COMPLETED", job.log()
    assert job.restarts == 1
    assert f"exit code {PREEMPTED}: requeued" in job.log()
