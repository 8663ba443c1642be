"""The batch script of `jdpo launch slurm`, run by stand-ins for Slurm's programs; test_slurm_cluster.py has a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from jdpo.cli.main import main
from jdpo.exit_codes import EXIT_CODES, LOST, PREEMPTED, USAGE
from tests.launch.fake_programs import FAKE_JDPO, Fakes, write_config

# Runs the job at once, again after each requeue. As Slurm, it sets the number of restarts from the first restart on.
SBATCH = """
[[ ! -e $FAKES/no_sbatch ]] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "Submitted batch job 7"
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1
restarts=0
while :; do
  rm -f "$FAKES/requeue"
  bash "$1" >> "$FAKES/out" 2>&1
  echo $? >> "$FAKES/ends"
  [[ -e $FAKES/requeue ]] || exit 0
  restarts=$((restarts + 1))
  export SLURM_RESTART_COUNT=$restarts
done
"""
SRUN = """
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# The batch script, its parent, gets a signal, and the tasks end a while after it has passed that on.
SRUN_SIGNALLED = """
trap 'echo "srun signalled" >> "$FAKES/calls"' TERM
kill -TERM $PPID
until grep -q ^scancel "$FAKES/calls"; do sleep 0.01; done
sleep 0.1
exit 143
"""
SCONTROL = '[[ ! -e $FAKES/no_requeue ]] || exit 1\ntouch "$FAKES/requeue"\n'
SQUEUE = 'cat "$FAKES/state" 2>/dev/null || echo RUNNING\n'


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": "", "jdpo": FAKE_JDPO}
    for name, body in programs.items():
        fakes.add(name, body)
    return fakes


def launch(tmp_path: Path, *options: str) -> int:
    return main(["launch", "slurm", str(write_config(tmp_path)), "--on", "h100x16", *options])


def ends(fakes: Fakes) -> list[int]:
    """Returns the exit codes of the batch script, by start."""
    return [int(line) for line in (fakes.folder / "ends").read_text().split()]


@pytest.mark.parametrize("code", [each.code for each in EXIT_CODES])
def test_the_job_is_requeued_after_the_codes_that_are_to_restart_and_after_no_other(
    fakes: Fakes, tmp_path: Path, code: int
) -> None:
    fakes.codes([code])
    assert launch(tmp_path) == 0
    restart = next(each.restart for each in EXIT_CODES if each.code == code)
    assert ends(fakes) == ([code, 0] if restart else [code])
    assert fakes.calls("scontrol") == ["scontrol requeue 7"] * restart
    # The same command again, and the words arrive as they are.
    assert set(fakes.calls("jdpo")) == {f"jdpo dpo {tmp_path}/run.yaml"}


def test_sbatch_shows_the_number_of_the_job_and_how_to_follow_it(
    fakes: Fakes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path) == 0
    shown = capfd.readouterr().out
    assert "Submitted batch job 7" in shown
    assert "squeue --me" in shown
    assert f"tail -F '{tmp_path}/run out/launch/run'-JOB-0.log" in shown


def test_a_job_that_cannot_be_submitted_is_an_error(
    fakes: Fakes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (fakes.folder / "no_sbatch").touch()
    assert launch(tmp_path) == 1
    assert not fakes.calls("srun")
    assert "sbatch ended with exit code 1" in capfd.readouterr().out


def test_a_signal_for_the_script_is_passed_on_to_the_tasks_and_they_are_waited_for(
    fakes: Fakes, tmp_path: Path
) -> None:
    fakes.add("srun", SRUN_SIGNALLED)
    assert launch(tmp_path, "--max_restarts", "1") == 0
    assert ends(fakes) == [PREEMPTED, PREEMPTED]
    assert fakes.calls("scancel") == ["scancel --signal=TERM 7"] * 2
    assert fakes.calls("srun")[-1] != "srun signalled", "srun kills its tasks when it is signalled"
    assert fakes.calls("scontrol") == ["scontrol requeue 7"]


def test_a_cancelled_job_is_not_requeued(fakes: Fakes, tmp_path: Path) -> None:
    (fakes.folder / "state").write_text("COMPLETING\n")
    fakes.codes([PREEMPTED])
    assert launch(tmp_path) == 0
    assert ends(fakes) == [PREEMPTED]
    assert not fakes.calls("scontrol")


def test_restarts_are_bounded(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([LOST] * 9)
    assert launch(tmp_path, "--max_restarts", "2") == 0
    assert ends(fakes) == [LOST] * 3
    assert "no restart is left of 2" in (fakes.folder / "out").read_text()


def test_a_cluster_that_does_not_requeue_is_reported(fakes: Fakes, tmp_path: Path) -> None:
    (fakes.folder / "no_requeue").touch()
    fakes.codes([PREEMPTED])
    assert launch(tmp_path) == 0
    assert ends(fakes) == [PREEMPTED]
    assert "Slurm does not requeue it" in (fakes.folder / "out").read_text()


def test_the_doctor_comes_first_and_its_findings_end_the_job(fakes: Fakes, tmp_path: Path) -> None:
    fakes.codes([0, LOST, 1])  # fine, a run that loses a process, and something wrong at the next start
    assert launch(tmp_path, "--doctor") == 0
    assert ends(fakes) == [LOST, 1]
    assert [call.split()[1] for call in fakes.calls("jdpo")] == ["doctor", "dpo", "doctor"]


def test_a_required_secret_comes_from_the_environment(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    assert launch(tmp_path, "--secret", "SOME_TOKEN") == 0
    assert ends(fakes) == [1]
    assert not fakes.calls("srun")
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    assert launch(tmp_path, "--secret", "SOME_TOKEN") == 0
    assert ends(fakes) == [1, 0]
    assert "very-secret" not in (tmp_path / "run out" / "launch" / "run.slurm.sh").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--on", "v6e-16"], "for nodes of GPUs"),
        (["--on", "h100x8", "--tasks_per_node", "3"], "cannot be shared equally"),
        (["--on", "h100x8", "--partition", "a\nb"], "on one line"),
        (["--on", "h100x8", "--chdir", "here"], "expected an absolute path"),
        (["--on", "h100x8", "--grace_seconds", "0"], "seconds above 0"),
    ],
)
def test_what_slurm_cannot_do_is_refused(
    tmp_path: Path, words: Sequence[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", str(write_config(tmp_path)), *words, "--dry_run"]) == USAGE
    assert part in capsys.readouterr().err


def test_options_of_sbatch_are_in_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition", "large", "--time", "24:00:00", "--sbatch=--qos=high", "--srun=--mpi=none"]
    assert main(["launch", "slurm", str(write_config(tmp_path)), "--on", "h100x2", *options, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for each in ("partition=large", "time=24:00:00", "qos=high", "nodes=1", "gpus-per-node=2", "signal=TERM@120"):
        assert f"#SBATCH --{each}" in lines
    assert "#SBATCH --exclusive" not in lines, "two of eight GPUs leave the others to other jobs"
    assert any(" --mpi=none " in line for line in lines)
