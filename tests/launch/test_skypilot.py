"""The task of `jdpo launch skypilot`: its schema, and its scripts run to their ends with a stand-in for SkyPilot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdpo.cli.commands.clusters.launch import planned
from jdpo.cli.main import main
from jdpo.exit_codes import EXIT_CODES, LOST, STALLED, USAGE, ExitCode
from tests.launch.conftest import CODED, Fake, calls_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "jdpo[cuda] @ git+https://example.org/jdpo@v1"
WORDS = ("skypilot", "dpo.yaml", "--package", PACKAGE)
MIRROR = "mirror=gs://bucket/first"

SKY = (
    f"#!{sys.executable}"
    + r"""
# Runs a managed job: setup and run on each node, and again as `job_recovery` says. A line in `lost` is a preemption.
import os, subprocess, sys, yaml
from pathlib import Path
open(os.environ["CALLS"], "a").write("sky " + " ".join(sys.argv[1:]) + "\n")
if Path("no_sky").exists():
    sys.exit("sky.exceptions.ResourcesUnavailableError: no such accelerator")
task = yaml.safe_load(open(sys.argv[-1]))
secrets = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--secret"]
assert all(name in os.environ for name in [*task.get("secrets", {}), *secrets]), "a secret is missing"
recovery, nodes = task["resources"]["job_recovery"], task.get("num_nodes", 1)
home = Path("home").resolve()
while True:
    (home / "jdpo").mkdir(parents=True, exist_ok=True)
    codes = []  # of the nodes; when one fails, SkyPilot kills the others
    for rank in range(nodes):
        env = dict(os.environ, **task["envs"], HOME=str(home), SKYPILOT_TASK_ID="sky-managed-1",
                   SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NUM_NODES=str(nodes),
                   SKYPILOT_NODE_IPS="\n".join(f"10.0.0.{i}" for i in range(nodes)))
        subprocess.run(["bash", "-c", task["setup"]], env=env, check=True)
        codes.append(subprocess.run(["bash", "-c", task["run"]], env=env).returncode)
    failed = next((code for code in codes if code), 0)
    codes = [failed] + [137] * (nodes - 1) if failed else [0]
    if Path("lost").exists():
        Path("lost").unlink()
        continue
    if not {*codes} & {*recovery["recover_on_exit_codes"]}:
        Path("end").write_text(str(failed))
        break
"""
)


@pytest.fixture
def calls(config: Path, fake: Fake) -> Path:
    """The calls of stand-ins for sky and jdpo, in the folder of the config."""
    fake("sky", SKY)
    fake("uv", '#!/bin/bash\necho "uv $*" >> "$CALLS"\n')
    fake("sleep", "#!/bin/bash\n")
    place = "$JAX_PROCESS_ID/${JAX_NUM_PROCESSES-} ${JAX_COORDINATOR_ADDRESS-}"
    return fake("jdpo", f'#!/bin/bash\ncd "$OLDPWD"\necho "{place}" >> places\n{CODED}')


def launch(*options: str, on: str = "h100x8", codes: Sequence[int] = ()) -> str:
    """Launches a job that ends; returns its exit code as text.

    Args:
      codes: how the processes of jdpo end, in the order in which they start.
    """
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    Path("shared").mkdir(exist_ok=True)
    assert main(["launch", *WORDS, "--on", on, MIRROR, "--mount", f"{Path.cwd()}/shared", *options]) == 0
    return Path("end").read_text()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(end, id=str(end.code), marks=() if end.code in (LOST, USAGE) else pytest.mark.ci)
        for end in EXIT_CODES
    ],
)
def test_the_job_is_recovered_after_the_codes_that_are_to_restart_and_after_no_other(
    calls: Path, end: ExitCode
) -> None:
    assert launch(codes=[end.code]) == ("0" if end.restart else str(end.code))
    (command, *more) = calls_of(calls, "jdpo")
    assert more == [command] * end.restart, "the same command again"
    assert command.endswith(f"home/jdpo/dpo.yaml {MIRROR}")
    assert len([call for call in calls_of(calls, "uv") if PACKAGE in call]) == 1, "installed once"


def test_a_job_that_sky_cannot_launch_is_an_error(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("no_sky").touch()
    assert main(["launch", *WORDS, "--on", "h100x8", MIRROR]) == 1
    assert "no such accelerator" in capfd.readouterr().err
    assert not calls_of(calls, "jdpo")


def test_a_job_that_is_preempted_continues(calls: Path) -> None:
    Path("lost").touch()
    assert launch(codes=[137, 0]) == "0"
    assert len(calls_of(calls, "jdpo")) == 2


def test_restarts_are_bounded(calls: Path) -> None:
    assert launch("--max_restarts", "2", codes=[STALLED] * 9) == "1"
    assert len(calls_of(calls, "jdpo")) == 3


def test_nodes_of_gpus_find_each_other(calls: Path, fake: Fake) -> None:
    fake("mountpoint", "#!/bin/bash\n")  # of a share that is mounted
    assert launch("--nfs", "10.0.0.9:/share", on="h100x16", codes=[0, LOST, 0, 0]) == "0"
    assert Path("places").read_text().splitlines() == ["0/2 10.0.0.0:8476", "1/2 10.0.0.0:8476"] * 2


def test_an_error_of_one_node_is_no_reason_to_restart(calls: Path, fake: Fake) -> None:
    fake("mountpoint", "#!/bin/bash\n")
    # SkyPilot kills the other node, whose exit code is then 137.
    assert launch("--nfs", "10.0.0.9:/share", on="h100x16", codes=[USAGE]) == str(USAGE)
    assert len(calls_of(calls, "jdpo")) == 2


def test_the_doctor_comes_first_and_its_findings_end_the_job(calls: Path) -> None:
    assert launch("--doctor", codes=[0, LOST, 1]) == "1"
    assert [call.split()[1] for call in calls_of(calls, "jdpo")] == ["doctor", "dpo", "doctor"]


def test_secrets_are_passed_by_name(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    monkeypatch.setenv("OTHER_TOKEN", "more-secret")
    assert launch("--secret", "OTHER_TOKEN") == "0"
    (call,) = calls_of(calls, "sky")
    assert "--yes --detach-run --secret HF_TOKEN --secret OTHER_TOKEN" in call
    assert "-secret" not in call.replace("--secret", "")
    assert task_of("--on", "h100x8", MIRROR, "--secret", "OTHER_TOKEN")["secrets"] == {"OTHER_TOKEN": None}


def task_of(*words: str) -> dict[str, Any]:
    (text,) = planned([*WORDS, *words]).files.values()
    task: dict[str, Any] = yaml.safe_load(text)
    return task


@pytest.mark.parametrize(
    ("machine", "accelerators", "nodes"),
    [
        ("h200x16", "H200:8", 2),
        ("h100", "H100:1", 1),
        ("v5e-16", "tpu-v5litepod-16:1", 1),
        ("v5p-64", "tpu-v5p-64:1", 1),
    ],
)
def test_machines_by_the_names_of_skypilot(config: Path, machine: str, accelerators: str, nodes: int) -> None:
    package = PACKAGE if machine.startswith("h") else PACKAGE.replace("cuda", "tpu")
    words = ("--on", machine, "--nfs", "10.0.0.9:/share", "--infra", "gcp/us-east5", "--spot", "--package", package)
    task = task_of(*words)
    assert task["resources"]["accelerators"] == accelerators
    assert task.get("num_nodes", 1) == nodes
    assert task["resources"]["infra"] == "gcp/us-east5"
    assert task["resources"]["use_spot"] is True


def test_rows_and_a_wheel_here_are_copied(config: Path) -> None:
    Path("pairs.jsonl").touch()
    Path("jdpo-1-py3-none-any.whl").touch()
    task = task_of(
        "--on", "h100x8", MIRROR, "datasets=pairs.jsonl", "report_to=wandb", "--package", "jdpo-1-py3-none-any.whl"
    )
    assert task["file_mounts"] == {
        "~/jdpo/dpo.yaml": "dpo.yaml",
        "~/jdpo/jdpo-1-py3-none-any.whl": "jdpo-1-py3-none-any.whl",
        "/mnt/jdpo/pairs.jsonl": "pairs.jsonl",
    }
    assert "package='./jdpo-1-py3-none-any.whl[cuda,gcs,wandb]'" in task["setup"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "tpu7x-8"], "use `jdpo launch jobset`"),
        (["--on", "2xv5e-16"], "does not join several TPU slices"),
        (["--on", "h100x16", MIRROR], "share no disk"),
        (["--on", "h100x8", MIRROR, "--package", "jdpo[tpu]==1"], "expected jdpo[cuda]"),
        (["--on", "v6e-8", MIRROR], "expected jdpo[tpu]"),
        (["--on", "h100x8"], "a mirror"),
    ],
)
def test_what_cannot_work_is_refused(
    config: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *WORDS, *words, "--dry_run"]) == USAGE
    assert part in " ".join(capsys.readouterr().err.split())


EXAMPLES = sorted((ROOT / "scripts" / "launch").glob("*/skypilot.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_scripts_of_a_task_pass_shellcheck(path: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {*task} <= {"name", "num_nodes", "resources", "file_mounts", "envs", "secrets", "setup", "run"}
    for part in ("setup", "run"):
        words = [str(program), "--shell=bash", "-"]
        done = subprocess.run(words, input=task[part], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


CHECK = """
import sys, jsonschema, sky, yaml
from sky.utils import schemas
for path in sys.argv[1:]:
    task = yaml.safe_load(open(path))
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    task["file_mounts"] = {}  # of files that are not here
    sky.Task.from_yaml_config(task)
"""


@pytest.fixture(scope="module")
def sky_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with SkyPilot, in an environment of its own: its requirements do not agree with those of jdpo."""
    folder = tmp_path_factory.mktemp("sky")
    python = str(folder / "bin" / "python")
    uv = Path(sys.executable).with_name("uv")
    for words in (
        ["venv", folder, "--python", sys.executable],
        ["pip", "install", "--python", python, "skypilot==0.14.1"],
    ):
        done = subprocess.run([uv, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"SkyPilot cannot be installed: {done.stderr[-500:]}")
    return python


@pytest.mark.full
def test_skypilot_takes_the_tasks_and_refuses_broken_ones(sky_python: str, tmp_path: Path) -> None:
    def check(*paths: Path) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        environ.pop("PYTHONPATH", None)
        words = [sky_python, "-c", CHECK, *map(str, paths)]
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)

    done = check(*EXAMPLES)
    assert done.returncode == 0, done.stderr
    for break_it in (
        lambda task: task.update(max_restarts=3),
        lambda task: task["resources"].update(use_spots=True),
        lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=[300]),
    ):
        task = yaml.safe_load(EXAMPLES[0].read_text(encoding="utf-8"))
        break_it(task)
        broken = tmp_path / "broken.yaml"
        broken.write_text(json.dumps(task))
        assert "ValidationError" in check(broken).stderr
