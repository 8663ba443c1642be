"""The scripts of `jdpo launch tpu-vm`, run to their ends with a stand-in for gcloud."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import jdpo
from jdpo.cli.commands.clusters.launch import planned
from jdpo.cli.main import main
from jdpo.exit_codes import EXIT_CODES, FAILED, LOST, PREEMPTED, RESTART_CODES, STALLED, USAGE
from tests.conftest import chat_pairs, write_jsonl
from tests.launch.conftest import Fake, calls_of
from tests.launch.fake_cloud import PROGRAMS

Capture = pytest.CaptureFixture[str]

PACKAGE = "jdpo[tpu] @ git+https://example.org/jdpo@v1"
WORDS = ("dpo.yaml", "--zone", "us-east5-b", "--package", PACKAGE)
MIRROR = "mirror=gs://bucket/first"


class Cloud:
    """A stand-in for Google Cloud; see tests/launch/fake_cloud.py."""

    def __init__(self, folder: Path, calls: Path) -> None:
        self.folder, self.calls = folder, calls

    def launch(self, *options: str, on: str = "v6e-8", nfs: bool = True, codes: Sequence[str] = ("0",)) -> int:
        """Launches; returns the exit code of the script.

        Args:
          codes: how each start ends, see `fake_cloud`.
        """
        (self.folder / "codes").write_text("".join(f"{line}\n" for line in codes))
        return main(["launch", "tpu-vm", *WORDS, "--on", on, *self.storage(nfs), *options])

    def storage(self, nfs: bool) -> list[str]:
        return ["--mount", str(self.folder / "shared"), *(["--nfs", "10.0.0.2:/share"] if nfs else [])]

    def starts(self) -> list[str]:
        """Returns the calls of jdpo on the hosts."""
        return calls_of(self.calls, "jdpo")

    def requests(self, verb: str) -> list[str]:
        """Returns the calls of `gcloud compute tpus queued-resources VERB`."""
        return [call for call in calls_of(self.calls, "gcloud") if f" queued-resources {verb} " in call]

    def logs(self) -> list[Path]:
        return sorted(Path("runs/first/launch/logs").glob("*/*/*.log"))


@pytest.fixture
def cloud(config: Path, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    for name, script in PROGRAMS.items():
        calls = fake(name, script)
    folder = tmp_path / "cloud"
    (folder / "shared").mkdir(parents=True)
    monkeypatch.setenv("CLOUD", str(folder))
    monkeypatch.setenv("HOSTS", "1")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    return Cloud(folder, calls)


def test_a_run_on_several_hosts(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setenv("HOSTS", "4")
    (cloud.folder / "queue").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\n")
    assert cloud.launch("beta=0.2", "--spot", on="v6e-16") == 0
    (create,) = cloud.requests("create")
    for part in ("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=dpo", "--spot"):
        assert part in create
    assert len(cloud.starts()) == 4
    shared = cloud.folder / "shared"
    for index, call in enumerate(sorted(cloud.starts(), key=lambda call: call.partition("[")[2])):
        config = cloud.folder / "hosts" / f"dpo-h{index}" / "jdpo-dpo" / "dpo.yaml"
        assert call == f"jdpo dpo {config} beta=0.2 [dpo-h{index} {shared} very-secret]"
    assert len([call for call in calls_of(cloud.calls, "uv") if PACKAGE in call]) == 4
    assert [path.name for path in cloud.logs()] == ["0.log", "1.log", "2.log", "3.log"]
    assert cloud.logs()[2].read_text() == "output of dpo-h2\n"
    assert len(cloud.requests("delete")) == 1, "it costs"
    # The token goes over the connection: it is in no command line and no file.
    assert "very-secret" not in "".join(calls_of(cloud.calls, "gcloud"))
    written = [path for root in (Path("runs"), shared) for path in root.rglob("*") if path.is_file()]
    assert not [path for path in written if "very-secret" in path.read_text()]
    out = capfd.readouterr().out
    assert "very-secret" not in out
    assert out.count("is WAITING_FOR_RESOURCES") == out.count("is PROVISIONING") == 1


@pytest.mark.ci
def test_several_slices_are_one_request(cloud: Cloud) -> None:
    assert cloud.launch("--reserved", "--create=--network=own", on="2xv5e-8") == 0
    (create,) = cloud.requests("create")
    for part in ("--accelerator-type=v5litepod-8", "--node-count=2 --node-prefix=dpo --reserved --network=own"):
        assert part in create
    assert sorted(call.split("[")[1].split()[0] for call in cloud.starts()) == ["dpo-0-h0", "dpo-1-h0"]


def test_a_required_secret_comes_from_the_environment(cloud: Cloud, capfd: Capture) -> None:
    assert cloud.launch("--secret", "SOME_TOKEN") == 1
    assert "SOME_TOKEN: export it" in capfd.readouterr().err
    assert not cloud.requests("create")


@pytest.mark.ci
def test_a_slice_that_cannot_be_created_again_is_tried_again(cloud: Cloud) -> None:
    (cloud.folder / "no_create").write_text("the second one")
    assert cloud.launch(codes=["preempt", "0"]) == 0
    assert len(cloud.requests("create")) == 3


def test_a_slice_that_cannot_be_created_is_an_error(cloud: Cloud, capfd: Capture) -> None:
    (cloud.folder / "no_create").touch()
    assert cloud.launch() == 7
    out, err = capfd.readouterr()
    assert "quota exceeded" in err
    assert "exit code 7" in out
    assert not cloud.starts()


@pytest.mark.ci
def test_a_request_that_fails_later_is_an_error_and_the_next_launch_makes_a_new_one(cloud: Cloud) -> None:
    (cloud.folder / "made").write_text("FAILED")
    assert cloud.launch() == 1
    assert not cloud.starts()
    (cloud.folder / "made").unlink()
    assert cloud.launch() == 0
    assert len(cloud.requests("create")) == 2


def test_a_slice_that_is_taken_away_is_created_again_and_the_run_continues(cloud: Cloud, capfd: Capture) -> None:
    assert cloud.launch("--spot", codes=["preempt", "0"]) == 0
    assert len(cloud.requests("create")) == 2
    assert len(cloud.starts()) == 2
    assert len({call.split("[")[0] for call in cloud.starts()}) == 1, "the same command again"
    assert "taken away: restart 1 of at most 20" in capfd.readouterr().out


@pytest.mark.ci
def test_a_broken_connection_does_not_end_the_run(cloud: Cloud, capfd: Capture) -> None:
    assert cloud.launch(codes=["deaf"]) == 0
    assert "not all hosts answer" in capfd.readouterr().out
    assert len(cloud.starts()) == len(cloud.requests("create")) == 1


def test_after_codes_that_are_to_restart_the_same_slice_is_used(cloud: Cloud) -> None:
    assert cloud.launch(codes=[*map(str, RESTART_CODES), "0"]) == 0
    assert len(cloud.starts()) == len(RESTART_CODES) + 1
    assert len(cloud.requests("create")) == 1
    assert len([call for call in calls_of(cloud.calls, "uv") if PACKAGE in call]) == 1, "installed once"


def test_the_error_of_one_host_ends_the_run_whatever_the_others_say(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTS", "4")
    assert cloud.launch(on="v6e-16", codes=[f"{LOST} {USAGE} {LOST}"]) == USAGE
    assert len(cloud.starts()) == 4
    assert len(cloud.requests("create")) == 1


def test_after_an_error_a_slice_stays_whose_disk_holds_the_only_copy(cloud: Cloud, capfd: Capture) -> None:
    assert cloud.launch(MIRROR, nfs=False, codes=[str(FAILED)]) == FAILED
    assert not cloud.requests("delete")
    assert "costs until it is deleted" in capfd.readouterr().out
    assert subprocess.run(["bash", "runs/first/launch/tpu-vm.sh", "delete"]).returncode == 0
    assert len(cloud.requests("delete")) == 1


@pytest.mark.ci
def test_restarts_are_bounded(cloud: Cloud, capfd: Capture) -> None:
    assert cloud.launch("--max_restarts", "1", codes=[str(STALLED)] * 5) == STALLED
    assert len(cloud.starts()) == 2
    assert "no restart is left of 1" in capfd.readouterr().out


def test_the_doctor_comes_first_and_its_findings_end_the_run(cloud: Cloud) -> None:
    assert cloud.launch("--doctor", codes=["1"]) == 1
    assert [call.split()[1] for call in cloud.starts()] == ["doctor"]


def test_a_script_that_ends_leaves_the_run_and_the_next_one_attaches(cloud: Cloud) -> None:
    process, output = start(cloud)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PREEMPTED
    assert "the run on it goes on" in output.read_text()
    (cloud.folder / "deaf").write_text("x\n" * 3)  # while hosts do not answer, it is not known that something runs
    (cloud.folder / "finish").touch()
    assert cloud.launch(codes=["wait"]) == 0
    assert len(cloud.starts()) == 1
    assert "output of dpo-h0" in cloud.logs()[0].read_text()


@pytest.mark.ci
def test_stop_saves_and_ends_the_run(cloud: Cloud) -> None:
    process, output = start(cloud)
    assert subprocess.run(["bash", "runs/first/launch/tpu-vm.sh", "stop"]).returncode == PREEMPTED
    assert process.wait(60) in (PREEMPTED, 1)
    assert len(cloud.starts()) == 1
    assert "saved" in next((cloud.folder / "shared" / "logs").rglob("*.log")).read_text(), output.read_text()


def start(cloud: Cloud) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts the script, with a run that waits; returns it and its output."""
    (cloud.folder / "codes").write_text("wait\n")
    words = ["launch", "tpu-vm", *WORDS, "--on", "v6e-8", *cloud.storage(nfs=True)]
    planned(words[1:]).write()
    output = cloud.folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(["bash", "runs/first/launch/tpu-vm.sh"], stdout=file, stderr=file)
    deadline = time.monotonic() + 60
    while not (cloud.folder / "waits").exists():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)
    return process, output


@pytest.mark.ci
def test_rows_here_are_copied_to_a_single_host(cloud: Cloud) -> None:
    Path("pairs.jsonl").write_text("{}\n")
    assert cloud.launch(MIRROR, "datasets=pairs.jsonl", nfs=False) == 0
    link = cloud.folder / "shared" / "pairs.jsonl"
    assert os.readlink(link) == str(cloud.folder / "hosts" / "dpo-h0" / "jdpo-dpo" / "pairs.jsonl")
    assert not [call for call in calls_of(cloud.calls, "sudo") if " mount " in call]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "tpu7x-8", "--nfs", "a:/b"], "use `jdpo launch jobset`"),
        (["--on", "h100x8", "--nfs", "a:/b"], "is for TPUs"),
        (["--on", "v6e-16"], "gcsfuse"),
        (["--on", "v6e-16", MIRROR], "share no disk"),
        (["--on", "v6e-8"], "a mirror"),
        (["--on", "v6e-8", "--nfs", "b"], "expected ADDRESS:/SHARE"),
        (["--on", "v6e-8", MIRROR, "--spot", "--reserved"], "exclude each other"),
        (["--on", "v6e-8", MIRROR, "--package", "jdpo"], "another version"),
        (["--on", "v6e-8", MIRROR, "--package", "a.whl"], "no such wheel"),
        (["--on", "v6e-8", MIRROR, "--create", "network=ours"], "--create=--NAME=VALUE"),
        (["--on", "v6e-8", MIRROR, "--constraints", "no.txt"], "no such file"),
        (["--on", "v6e-8", MIRROR, "output_dir=/x"], "expected a relative path"),
        (["--on", "v6e-8", MIRROR, "datasets=data/pairs.jsonl"], "are copied"),
    ],
)
def test_what_cannot_work_is_refused(config: Path, words: list[str], part: str, capsys: Capture) -> None:
    Path("data").mkdir()
    Path("data/pairs.jsonl").touch()
    assert main(["launch", "tpu-vm", *WORDS, *words, "--dry_run"]) == USAGE
    assert part in " ".join(capsys.readouterr().err.split())


def test_gcloud_has_to_be_installed(config: Path, fake: Fake, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("bash", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", os.environ["PATH"].split(":")[0])
    assert main(["launch", "tpu-vm", *WORDS, "--on", "v6e-8", MIRROR]) == USAGE
    assert "cloud.google.com/sdk" in capsys.readouterr().err


def test_every_code_of_the_table_is_known_to_the_script(config: Path, capsys: Capture) -> None:
    assert main(["launch", "tpu-vm", *WORDS, "--on", "v6e-8", MIRROR, "--dry_run"]) == 0
    restarts = " | ".join(str(each.code) for each in EXIT_CODES if each.restart)
    assert f"\n    {restarts}) true ;;\n" in capsys.readouterr().out


@pytest.mark.full
def test_a_run_that_is_killed_on_its_host_continues(cloud: Cloud, toy_model: Path, fake: Fake) -> None:
    fake("jdpo", f'#!/bin/bash\necho "jdpo $*" >> "$CALLS"\nexec {Path(sys.executable).with_name("jdpo")} "$@"\n')
    write_jsonl(cloud.folder / "shared" / "pairs.jsonl", chat_pairs(16, words=(6, 7)))
    config = {
        "model_name_or_path": str(toy_model),
        "datasets": "pairs.jsonl",
        "output_dir": "runs/first",
        "max_length": 64,
        "global_batch_size": 8,
        "max_steps": 60,
        "save_steps": 2,
        "reference": "live",
        "remat": "none",
    }
    Path("dpo.yaml").write_text(json.dumps(config))
    run = cloud.folder / "shared" / "runs" / "first"
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 600
        while not any(run.glob("checkpoints/*/manifest.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(int((cloud.folder / "hosts" / "dpo-h0" / "jdpo-dpo" / "child").read_text()), signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    env = [f"PYTHONPATH={Path(jdpo.__file__).parents[1]}", "JAX_PLATFORMS=cpu"]
    assert cloud.launch(*(word for each in env for word in ("--env", each))) == 0
    assert killed.is_set()
    assert len(cloud.starts()) == 2
    assert (run / "run.json").exists()
    first, second = (path.read_text() for path in sorted(cloud.logs()))
    assert "resum" not in first
    assert "resum" in second
