"""`kill -9` and a restart leave what an uninterrupted run leaves, bitwise, at any moment.

Real processes of the command line and real signals: some sent by the process to itself at an exact point of the
code (`kill_point.py`), some from outside once a certain file appears. All fall after the first whole checkpoint.
"""

from __future__ import annotations

import functools
import importlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.cli.main import main

Words = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]
SameRun = Callable[[Path, Path], None]

MANAGER = "jdpo.checkpoint.manager"

# (function, before or after its nth call, name of its thread), in the order of a run.
POINTS = {
    "asynchronous save": (f"{MANAGER}:CheckpointManager.save", "after", 1),
    "between orbax' commit and the manifest": (f"{MANAGER}:CheckpointManager._seal", "before", 1),
    "clearing away the unfinished step": ("jdpo.checkpoint.steps:delete_step", "before", 1),
    "manifest half written": ("jdpo.durable:os.fsync", "before", 1, "checkpoint-manifest"),
    "a step": ("jdpo.training.step_reports:StepReports.read", "before", 3),
    "evaluation": ("jdpo.training.evaluation:RowAverages.add", "before", 1),
    "evaluation logged, step not saved": ("jdpo.training.evaluation:Evaluation.log", "after", 1),
    "between the manifest and retention": (f"{MANAGER}:CheckpointManager._delete_old", "before", 1),
    "retention, the old step half deleted": ("jdpo.durable:os.unlink", "after", 3, "checkpoint-manifest"),
    "metrics logged, step not saved": ("jdpo.training.logs.recording:Record.log", "after", 1),
    "export, weights half written": ("jdpo.checkpoint.shard_files:copy_cast", "after", 5),
    "export, before the model appears": ("jdpo.checkpoint.output_folders:_publish", "before", 1),
    "model exported, run not marked finished": ("jdpo.training.finish:write_plots", "after", 1),
}


def assert_killed(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.parametrize("target", [target for target, *_ in POINTS.values()])
def test_every_point_names_a_function(target: str) -> None:
    """The kills themselves run rarely: a point that was renamed should not wait for them to be noticed."""
    module, _, qualname = target.partition(":")
    assert callable(functools.reduce(getattr, qualname.split("."), importlib.import_module(module)))


@pytest.mark.ci
def test_killed_between_commit_and_manifest(
    cut_words: Words, uninterrupted: Path, same_run: SameRun, jdpo_process: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert_killed(jdpo_process(cut_words(run), "SIGKILL", *POINTS["between orbax' commit and the manifest"]))
    (step,) = [path for path in (run / "checkpoints").iterdir() if not (path / "manifest.json").exists()]
    assert (step / "state").is_dir(), "orbax had finished"
    assert main(cut_words(run)) == 0
    same_run(run, uninterrupted)


@pytest.mark.full
def test_one_run_killed_at_every_point(
    cut_words: Words,
    uninterrupted: Path,
    same_run: SameRun,
    jdpo_process: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    for point in POINTS.values():
        assert_killed(jdpo_process(cut_words(run), "SIGKILL", *point))
    assert main(cut_words(run)) == 0
    same_run(run, uninterrupted)


TELL_TALES = {
    "orbax writes": "checkpoints/*orbax-checkpoint-tmp*",
    "a manifest is being written": "checkpoints/*/manifest.json.tmp",
    "a manifest exists": "checkpoints/4/manifest.json",
    "the model is being written": ".model.writing",
    "the model exists": "model",
}


@pytest.mark.full
@pytest.mark.parametrize("pattern", TELL_TALES.values(), ids=TELL_TALES)
def test_killed_from_outside(
    pattern: str, cut_words: Words, uninterrupted: Path, same_run: SameRun, jdpo_process: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = jdpo_process(cut_words(run))
    while process.poll() is None:
        if any(run.glob("checkpoints/*/manifest.json")) and any(run.glob(pattern)):
            process.kill()
            break
        time.sleep(0.001)
    assert_killed(process)
    assert main(cut_words(run)) == 0
    same_run(run, uninterrupted)
