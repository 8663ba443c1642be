"""The script of `jdpo launch host`, run to its end with a stand-in for jdpo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jdpo
from jdpo.cli.main import main
from jdpo.exit_codes import LOST, PREEMPTED, USAGE
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import XLA_FLAGS
from tests.launch.fake_programs import FAKE_JDPO, Fakes, write_config

# Saves for a while when it is asked to end, as a run does.
PATIENT_JDPO = """
trap 'sleep 0.1; exit 143' TERM
touch "$FAKES/ready"
while :; do sleep 0.05; done
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    fakes.add("jdpo", FAKE_JDPO)
    return fakes


def launch(tmp_path: Path, *options: str) -> int:
    config = str(write_config(tmp_path))
    return main(["launch", "host", config, "--on", "h100x8", "--backoff_seconds", "0", *options])


def test_a_lost_run_is_started_again_with_the_same_command(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([LOST, 0])
    assert launch(tmp_path) == 0
    assert fakes.calls("jdpo") == [f"jdpo dpo {tmp_path}/run.yaml"] * 2
    assert f"exit code {LOST}: restart 1 of at most 20" in (tmp_path / "run out/launch/run.log").read_text()


def test_an_error_of_the_run_ends_it(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([USAGE])
    assert launch(tmp_path) == USAGE
    assert len(fakes.calls("jdpo")) == 1


def test_restarts_are_bounded(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([LOST] * 9)
    assert launch(tmp_path, "--max_restarts", "2") == LOST
    assert len(fakes.calls("jdpo")) == 3


def test_the_doctor_comes_first_and_its_findings_end_the_run(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([1])
    assert launch(tmp_path, "--doctor") == 1
    assert [call.split()[1] for call in fakes.calls("jdpo")] == ["doctor"]


def test_a_signal_is_passed_on_and_the_run_is_not_started_again(fakes: Fakes, tmp_path: Path) -> None:
    fakes.add("jdpo", PATIENT_JDPO)
    write_config(tmp_path)
    words = [str(tmp_path / "run.yaml"), "--on", "h100x8", "--dry_run", "--folder", str(tmp_path)]
    script = _script(words, tmp_path)
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (fakes.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == PREEMPTED
    finally:
        process.kill()
        process.wait()
    assert len(fakes.calls("jdpo")) == 1


def test_processes_share_the_gpus_and_the_error_of_one_ends_the_run(fakes: Fakes, tmp_path: Path) -> None:
    note = 'echo "$JAX_NUM_PROCESSES $JAX_LOCAL_DEVICE_IDS" > "$FAKES/process-$JAX_PROCESS_ID"\n'
    fakes.add("jdpo", f"{note}((JAX_PROCESS_ID)) && exit {USAGE}\nexit {LOST}\n")
    assert launch(tmp_path, "--processes", "2") == USAGE
    assert (fakes.folder / "process-0").read_text() == "2 0,1,2,3\n"
    assert (fakes.folder / "process-1").read_text() == "2 4,5,6,7\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "h100x16"], "is 2 hosts"),
        (["--on", "h100x8", "--processes", "3"], "cannot be shared equally"),
        (["--on", "v6e-8", "--processes", "2"], "one process uses all chips"),
    ],
)
def test_what_one_machine_cannot_do_is_refused(
    tmp_path: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "host", str(write_config(tmp_path)), *words, "--dry_run"]) == USAGE
    assert part in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_train_and_a_killed_one_is_started_again_with_the_other(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"xla_force_host_platform_device_count": 1, **XLA_FLAGS}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in flags.items()))
    monkeypatch.setenv("PYTHONPATH", str(Path(jdpo.__file__).parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    config = {
        "model_name_or_path": str(toy_model),
        "datasets": str(write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(16, words=(6, 7)))),
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "max_length": 64,
        "global_batch_size": 8,
        "max_steps": 60,
        "save_steps": 2,
        "logging_steps": 1,
        "reference": "live",
        "remat": "none",
        "mesh": {"data": 1, "fsdp": 2},
        "heartbeat_timeout_seconds": 10,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    words = [str(tmp_path / "run.yaml"), "--on", "h100x2", "--processes", "2", "--backoff_seconds", "0"]
    script = _script([*words, "--dry_run", "--folder", str(tmp_path)], tmp_path)
    process = subprocess.Popen(["bash", str(script)])
    try:
        deadline = time.monotonic() + 600
        while not list((tmp_path / "run").glob("checkpoints/*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        _kill_a_process_of(process.pid)
        assert process.wait(600) == 0
    finally:
        process.terminate()
        process.wait()
    assert "restart 1 of" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run-1.log").read_text().count("process 1 of 2") == 2


def _script(words: list[str], folder: Path) -> Path:
    """Writes the script that `jdpo launch host` renders, without starting it."""
    from jdpo.cli.commands.clusters.launch import planned

    (launch,) = [planned(["host", *words])]
    launch.write()
    (path,) = launch.files
    return path


def _kill_a_process_of(parent: int) -> None:
    """Kills the last of the jdpo processes of a script with SIGKILL."""
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    runs = [pid for pid in children if b"jdpo" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(runs[-1], signal.SIGKILL)
