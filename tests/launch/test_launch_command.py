"""`jdpo launch`: what is written and called, what is printed, and what is refused."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jdpo.cli.commands.clusters.launch import planned
from jdpo.cli.main import main
from jdpo.launch.launchers import LAUNCHERS
from jdpo.launch.running import run_commands
from tests.launch.conftest import Fake

Capture = pytest.CaptureFixture[str]
JOBSET = ("jobset", "dpo.yaml", "--on", "v6e-16", "--image", "repo/jdpo:1", "--volume", "claim")

KUBECTL = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
"""

CLUSTER = f"""#!{sys.executable}
# A cluster with JobSet: `create` starts the run, and plays the exit codes of its pods, one list per start.
import json, os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
import yaml
from tests.launch.jobset_controller import Pod, outcome
path = sys.argv[sys.argv.index("--filename") + 1]
jobset = [each for each in yaml.safe_load_all(open(path)) if each["kind"] == "JobSet"][0]
state, restarts = "restart", 0
for codes in json.loads(os.environ["STARTS"]):
    assert state == "restart", "started again after its end"
    command = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    open(os.environ["CALLS"], "a").write(" ".join(command) + "\\n")
    state = outcome(jobset, [[Pod(code) for code in codes]], restarts=restarts)
    restarts += 1
open(os.environ["CALLS"], "a").write(state + "\\n")
"""


def refusal(words: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["launch", *words]) == 2
    return capsys.readouterr().err


def test_a_dry_run_prints_everything_and_does_nothing(config: Path, fake: Fake, capsys: Capture) -> None:
    calls = fake("kubectl", KUBECTL)
    assert main(["launch", *JOBSET, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (
        "runs/first/launch/jobset.yaml",
        "kind: JobSet",
        "jdpo plan dpo.yaml --on v6e-16",
        "$ kubectl --namespace default create",
        "logs --follow",
    ):
        assert part in out
    assert not calls.exists()
    assert {path.name for path in Path().iterdir()} == {"bin", "dpo.yaml"}


def test_a_launch_writes_its_files_calls_kubectl_and_says_how_to_watch(
    config: Path, fake: Fake, capsys: Capture
) -> None:
    calls = fake("kubectl", KUBECTL)
    assert main(["launch", *JOBSET, "--folder", "my files", "--replace", "beta=0.2"]) == 0
    assert calls.read_text().splitlines() == [
        "--namespace default delete --ignore-not-found --filename my files/jobset.yaml",
        "--namespace default create --filename my files/jobset.yaml",
    ]
    out = capsys.readouterr().out
    assert "$ kubectl --namespace default create --filename 'my files/jobset.yaml'" in out
    assert "logs --follow" in out
    assert "kind: JobSet" in Path("my files/jobset.yaml").read_text()


def test_a_failed_create_is_reported_with_its_exit_code(
    config: Path, fake: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    fake("kubectl", '#!/bin/sh\necho "Error: jobsets.jobset.x-k8s.io \\"dpo\\" already exists" >&2\nexit 3\n')
    assert main(["launch", *JOBSET]) == 3
    out, err = capfd.readouterr()
    assert "already exists" in err
    assert "exit code 3" in out
    assert "--replace" in out
    assert "logs --follow" not in out  # there is nothing to watch


@pytest.mark.parametrize(
    ("starts", "end"),
    [
        ([[0, 0, 0, 0]], "complete"),
        ([[143, 75, 75, 75], [137, 75, 75, 75], [0, 0, 0, 0]], "complete"),  # preempted twice
        ([[143, 75, 75, 75], [1, 1, 1, 1]], "failed"),  # an error of the run after a preemption
        ([[2, 2, 2, 2]], "failed"),
    ],
)
def test_a_jobset_to_its_end(
    config: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, starts: list[list[int]], end: str
) -> None:
    calls = fake("kubectl", CLUSTER)
    monkeypatch.setenv("STARTS", str(starts))
    assert main(["launch", *JOBSET, "beta=0.2"]) == 0
    # Every start is the same command; a `failed` JobSet was not started again.
    assert calls.read_text().splitlines() == ["jdpo dpo /etc/jdpo/config.yaml beta=0.2"] * len(starts) + [end]


def test_what_is_missing_is_named_with_what_to_do(config: Path, fake: Fake, capsys: Capture) -> None:
    calls = fake("other", KUBECTL)
    os.environ["PATH"] = str(calls.with_name("bin"))  # no kubectl of this machine either; `fake` restores it
    message = refusal([*JOBSET], capsys)
    assert "kubectl is not on PATH" in message
    assert "kubernetes.io" in message
    assert not Path("runs").exists()
    assert "gcloud" in message
    assert "Dockerfile" in refusal([*JOBSET[:4]], capsys)
    assert "ReadWriteMany" in refusal([*JOBSET[:6]], capsys)
    assert "--on MACHINE is missing" in refusal(["jobset", "dpo.yaml"], capsys)
    assert "config is missing" in refusal(["jobset"], capsys)
    assert "no such file" in refusal(["jobset", "no.yaml", *JOBSET[2:]], capsys)
    Path("folder.yaml").mkdir()
    assert "found a folder" in refusal(["jobset", "folder.yaml", *JOBSET[2:]], capsys)
    for option in ("--name", "--on", "--env", "--secret", "--node_selector"):
        assert "it is empty" in refusal([*JOBSET, option, ""], capsys)


def test_a_folder_that_cannot_be_written_is_named(config: Path, fake: Fake, capsys: Capture) -> None:
    calls = fake("kubectl", KUBECTL)
    assert "--folder" in refusal([*JOBSET, "--folder", "dpo.yaml/launch"], capsys)
    assert not calls.exists()


def test_wrong_words_name_what_is_near(config: Path, capsys: Capture) -> None:
    message = refusal(["jobsets", "dpo.yaml"], capsys)
    assert "did you mean 'jobset'" in message
    assert all(name in message for name in LAUNCHERS)
    assert "is `jobset`" in refusal(["k8s", "dpo.yaml"], capsys)
    assert "did you mean '--image'" in refusal([*JOBSET, "--imag", "x"], capsys)
    assert "the launcher comes first" in refusal(["--on", "v6e-16"], capsys)
    assert "such as beta=0.2" in refusal([*JOBSET, "beta"], capsys)
    assert "0 or more" in refusal([*JOBSET, "--max_restarts", "-1"], capsys)
    assert "after the config as beta=VALUE" in refusal([*JOBSET, "--beta", "0.2"], capsys)
    assert "on one machine" in refusal([*JOBSET, "--on", "v6e-8"], capsys)
    message = refusal([*JOBSET, "--secret", "HF_TOKEN=hf_abc"], capsys)
    assert "the name alone" in message
    assert "hf_abc" not in message
    assert main(["submit"]) == 2
    assert "jdpo launch" in capsys.readouterr().err


def test_options_of_another_launcher_name_it(config: Path, capsys: Capture) -> None:
    of_all = {
        name: {field.name for field in each.options.__dataclass_fields__.values()} for name, each in LAUNCHERS.items()
    }
    for name, own in of_all.items():
        for option in own - of_all["jobset"]:
            message = refusal([*JOBSET, f"--{option}", "1"], capsys)
            assert f"--{option} is an option of `jdpo launch" in message, name


def test_the_examples_of_the_help_can_be_launched(config: Path, capsys: Capture) -> None:
    Path("run.yaml").write_text(config.read_text())
    for name, each in LAUNCHERS.items():
        words = each.example.replace("IMAGE", "repo/jdpo:1").replace("CLAIM", "claim").replace("VERSION", "1")
        assert planned([name, *shlex.split(words.replace("ZONE", "zone"))]).files, name
        with pytest.raises(SystemExit):
            main(["launch", name, "--help"])
        assert f"jdpo launch {name} run.yaml" in capsys.readouterr().out


def test_help_loads_no_jax() -> None:
    code = (
        "import sys; from jdpo.cli.commands.clusters.launch import parser; parser().format_help(); "
        "print(sorted({'jax', 'jinja2', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_configs_of_all_commands_can_be_launched(config: Path, capsys: Capture) -> None:
    for command in ("dpo", "sft", "reference"):
        assert main(["launch", *JOBSET, "--command", command, "--dry_run"]) == 0
        assert f"jdpo {command} /etc/jdpo/config.yaml" in capsys.readouterr().out
    assert "'beta'" in refusal([*JOBSET, "--command", "sft", "beta=0.2"], capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_command_that_is_asked_to_end_may_save_first(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM\nkill -TERM $PPID\nwhile :; do sleep 0.05; done\n"
    )
    lines: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    assert run_commands([["sh", str(script)], ["false"]], lines.append) == 143
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "exit code 143" in lines[-1]
    assert run_commands([["sh", "-c", "kill -9 $$"]], lines.append) == 128 + 9
