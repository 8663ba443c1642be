"""The batch script of `jdpo launch slurm`, run by stand-ins for Slurm; test_slurm_cluster.py has a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from jdpo.cli.main import main
from jdpo.exit_codes import EXIT_CODES, LOST, PREEMPTED, USAGE, ExitCode
from tests.launch.conftest import CODED, Fake, calls_of

# Runs the job at once, and again after each requeue. As Slurm, it sets the number of restarts after the first start.
SBATCH = """#!/bin/bash
[[ ! -e no_sbatch ]] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "Submitted batch job 7"
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1
restarts=0
while :; do
  rm -f requeue
  bash "$1" >> out 2>&1
  echo $? >> ends
  [[ -e requeue ]] || exit 0
  restarts=$((restarts + 1))
  export SLURM_RESTART_COUNT=$restarts
done
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# The batch script, its parent, gets a signal, and the tasks end a while after it has passed that on.
SRUN_SIGNALLED = """#!/bin/bash
trap 'echo "srun was signalled" >> "$CALLS"' TERM
kill -TERM $PPID
until grep -q ^scancel "$CALLS" 2>/dev/null; do sleep 0.01; done
sleep 0.1
exit 143
"""
NOTED = '#!/bin/bash\necho "${0##*/} $*" >> "$CALLS"\n'
SCONTROL = NOTED + "[[ ! -e no_requeue ]] || exit 1\ntouch requeue\n"
SQUEUE = "#!/bin/bash\ncat state 2>/dev/null || echo RUNNING\n"


@pytest.fixture
def calls(config: Path, fake: Fake) -> Path:
    """The calls of stand-ins for Slurm's programs and for jdpo, in the folder of the config."""
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": NOTED}
    for name, script in programs.items():
        fake(name, script)
    return fake("jdpo", f"#!/bin/bash\n{CODED}")


def launch(*options: str, codes: Sequence[int] = ()) -> list[int]:
    """Launches; returns the exit codes of the batch script, by start.

    Args:
      codes: how the tasks end, one code for each step of the job.
    """
    Path("ends").unlink(missing_ok=True)
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    assert main(["launch", "slurm", "dpo.yaml", "--on", "h100x16", *options]) == 0
    return [int(line) for line in Path("ends").read_text().split()]


@pytest.mark.parametrize("end", EXIT_CODES, ids=lambda end: str(end.code))
def test_the_job_is_requeued_after_the_codes_that_are_to_restart_and_after_no_other(calls: Path, end: ExitCode) -> None:
    assert launch(codes=[end.code]) == ([end.code, 0] if end.restart else [end.code])
    assert calls_of(calls, "scontrol") == ["scontrol requeue 7"] * end.restart
    assert set(calls_of(calls, "jdpo")) == {"jdpo dpo dpo.yaml"}, "the same command again"


def test_the_number_of_the_job_is_shown_and_how_to_follow_it(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("beta=0.2", "--folder", "my files") == [0]
    assert calls_of(calls, "jdpo") == ["jdpo dpo dpo.yaml beta=0.2"]
    shown = capfd.readouterr().out
    assert "Submitted batch job 7" in shown
    assert "squeue --me" in shown
    assert f"tail -F '{Path.cwd()}/my files/dpo'-JOB-0.log" in shown


def test_a_job_that_cannot_be_submitted_is_an_error(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("no_sbatch").touch()
    assert main(["launch", "slurm", "dpo.yaml", "--on", "h100x16"]) == 1
    assert not calls_of(calls, "jdpo")
    assert "sbatch ended with exit code 1" in capfd.readouterr().out


def test_a_signal_for_the_script_is_passed_on_to_the_tasks_and_they_are_waited_for(calls: Path, fake: Fake) -> None:
    fake("srun", SRUN_SIGNALLED)
    assert launch("--max_restarts", "1") == [PREEMPTED, PREEMPTED]
    assert calls_of(calls, "scancel") == ["scancel --signal=TERM 7"] * 2
    assert not calls_of(calls, "srun"), "srun kills its tasks when it is signalled"
    assert calls_of(calls, "scontrol") == ["scontrol requeue 7"]


def test_a_cancelled_job_is_not_requeued(calls: Path) -> None:
    Path("state").write_text("COMPLETING\n")
    assert launch(codes=[PREEMPTED]) == [PREEMPTED]
    assert not calls_of(calls, "scontrol")


def test_restarts_are_bounded(calls: Path) -> None:
    assert launch("--max_restarts", "2", codes=[LOST] * 9) == [LOST] * 3
    assert "no restart is left of 2" in Path("out").read_text()


def test_a_cluster_that_does_not_requeue_is_reported(calls: Path) -> None:
    Path("no_requeue").touch()
    assert launch(codes=[PREEMPTED]) == [PREEMPTED]
    assert "Slurm does not requeue it" in Path("out").read_text()


def test_the_doctor_comes_first_and_its_findings_end_the_job(calls: Path) -> None:
    # All is well, then the run loses a process, and at the next start something is wrong.
    assert launch("--doctor", codes=[0, LOST, 1]) == [LOST, 1]
    assert [call.split()[1] for call in calls_of(calls, "jdpo")] == ["doctor", "dpo", "doctor"]


def test_a_required_secret_comes_from_the_environment(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    assert launch("--secret", "SOME_TOKEN") == [1]
    assert not calls_of(calls, "jdpo")
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    assert launch("--secret", "SOME_TOKEN") == [0]
    assert "very-secret" not in Path("runs/first/launch/slurm.sh").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "v6e-16"], "for nodes of GPUs"),
        (["--on", "h100x8", "--tasks_per_node", "3"], "cannot be shared equally"),
        (["--on", "h100x8", "--partition", "a\nb"], "on one line"),
        (["--on", "h100x8", "--chdir", "here"], "expected an absolute path"),
        (["--on", "h100x8", "--time", "1 day"], "such as 90, 24:00:00 or 7-0"),
        (["--on", "h100x8", "--grace_seconds", "70000"], "at most 65535"),
        (["--on", "h100x8", "--sbatch", "qos=high"], "--sbatch=--NAME=VALUE"),
        (["--on", "h100x8", "--srun=mpi"], "--srun=--NAME=VALUE"),
    ],
)
def test_what_slurm_cannot_do_is_refused(
    config: Path, words: Sequence[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", str(config), *words, "--dry_run"]) == USAGE
    assert part in capsys.readouterr().err


def test_options_of_sbatch_are_in_the_script(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition", "large", "--time", "24:00:00", "--sbatch=--qos=high", "--srun=--mpi=none"]
    assert main(["launch", "slurm", str(config), "--on", "h100x2", *options, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for each in ("partition=large", "time=24:00:00", "qos=high", "nodes=1", "gpus-per-node=2", "signal=TERM@120"):
        assert f"#SBATCH --{each}" in lines
    assert "#SBATCH --exclusive" not in lines, "the other six GPUs of the node are for other jobs"
    assert any(" --mpi=none " in line for line in lines)
