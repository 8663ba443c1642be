"""The script of `jdpo launch host`, run to its end with a stand-in for jdpo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import jdpo
from jdpo.cli.commands.clusters.launch import planned
from jdpo.cli.main import main
from jdpo.exit_codes import LOST, PREEMPTED, USAGE
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import XLA_FLAGS
from tests.launch.conftest import CODED, Fake, calls_of

# Saves for a while when it is asked to end, as a run does.
PATIENT = """#!/bin/bash
echo "jdpo $*" >> "$CALLS"
trap 'sleep 0.1; exit 143' TERM
touch ready
while :; do sleep 0.05; done
"""


@pytest.fixture
def calls(config: Path, fake: Fake) -> Path:
    """The calls of a stand-in for jdpo, in the folder of the config."""
    return fake("jdpo", f"#!/bin/bash\n{CODED}")


def launch(*options: str, codes: Sequence[int] = ()) -> int:
    """Launches; returns the exit code.

    Args:
      codes: how the processes of jdpo end, in the order in which they start.
    """
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    return main(["launch", "host", "dpo.yaml", "--on", "h100x8", "--backoff_seconds", "1", *options])


def test_a_lost_run_is_started_again_with_the_same_command(calls: Path) -> None:
    assert launch("beta=0.2", codes=[LOST, 0]) == 0
    assert calls_of(calls, "jdpo") == ["jdpo dpo dpo.yaml beta=0.2"] * 2
    assert f"exit code {LOST}: restart 1 of at most 20" in Path("runs/first/launch/dpo.log").read_text()


def test_an_error_of_the_run_ends_it(calls: Path) -> None:
    assert launch(codes=[USAGE]) == USAGE
    assert len(calls_of(calls, "jdpo")) == 1


def test_restarts_are_bounded(calls: Path) -> None:
    assert launch("--max_restarts", "2", codes=[LOST] * 9) == LOST
    assert len(calls_of(calls, "jdpo")) == 3


def test_the_doctor_comes_first_and_its_findings_end_the_run(calls: Path) -> None:
    assert launch("--doctor", codes=[1]) == 1
    assert [call.split()[1] for call in calls_of(calls, "jdpo")] == ["doctor"]


def test_a_signal_is_passed_on_and_the_run_is_not_started_again(calls: Path, fake: Fake) -> None:
    fake("jdpo", PATIENT)
    process = subprocess.Popen(["bash", script("dpo.yaml", "--on", "h100x8")], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: Path("ready").exists(), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == PREEMPTED
    finally:
        process.kill()
        process.wait()
    assert len(calls_of(calls, "jdpo")) == 1


def test_processes_share_the_gpus_and_the_error_of_one_ends_the_run(calls: Path, fake: Fake) -> None:
    note = 'echo "$JAX_NUM_PROCESSES $JAX_LOCAL_DEVICE_IDS" > "process-$JAX_PROCESS_ID"'
    fake("jdpo", f"#!/bin/bash\n{note}\n((JAX_PROCESS_ID)) && exit {USAGE}\nexit {LOST}\n")
    assert launch("--processes", "2") == USAGE
    assert Path("process-0").read_text() == "2 0,1,2,3\n"
    assert Path("process-1").read_text() == "2 4,5,6,7\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "h100x16"], "is 2 hosts"),
        (["--on", "h100x8", "--processes", "3"], "cannot be shared equally"),
        (["--on", "v6e-8", "--processes", "2"], "one process uses all chips"),
    ],
)
def test_what_one_machine_cannot_do_is_refused(
    config: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "host", str(config), *words, "--dry_run"]) == USAGE
    assert part in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_train_and_after_the_loss_of_one_both_start_again(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"xla_force_host_platform_device_count": 1, **XLA_FLAGS}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in flags.items()))
    monkeypatch.setenv("PYTHONPATH", str(Path(jdpo.__file__).parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), chat_pairs(16, words=(6, 7)))
    config = {
        "model_name_or_path": str(toy_model),
        "datasets": "pairs.jsonl",
        "output_dir": "run",
        "cache_dir": "cache",
        "max_length": 64,
        "global_batch_size": 8,
        "max_steps": 60,
        "save_steps": 2,
        "reference": "live",
        "remat": "none",
        "mesh": {"data": 1, "fsdp": 2},
        "heartbeat_timeout_seconds": 10,
    }
    Path("run.yaml").write_text(json.dumps(config))
    process = subprocess.Popen(
        ["bash", script("run.yaml", "--on", "h100x2", "--processes", "2", "--backoff_seconds", "1")]
    )
    try:
        wait_for(lambda: any(Path("run").glob("checkpoints/*/manifest.json")), 600)
        kill_a_process_of(process.pid)
        assert process.wait(600) == 0
    finally:
        process.terminate()
        process.wait()
    assert "restart 1 of" in Path("run/launch/run.log").read_text()
    assert Path("run/launch/run-1.log").read_text().count("process 1 of 2") == 2


def script(*words: str) -> str:
    """Writes the script of a launch, without starting it; returns its path."""
    launch = planned(["host", *words])
    launch.write()
    (path,) = launch.files
    return str(path)


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_a_process_of(parent: int) -> None:
    """Kills the last of a script's processes of jdpo with SIGKILL."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    runs = [int(pid) for pid in children if b"run.yaml" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(runs[-1], signal.SIGKILL)
