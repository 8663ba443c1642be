"""Starts in a folder whose checkpoints or metrics are damaged, misnamed or from another run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.checkpoint.steps import MANIFEST, digest_of
from jdpo.cli.main import main

Words = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]
SameRun = Callable[[Path, Path], None]
Capture = pytest.CaptureFixture[str]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in run.glob(f"checkpoints/[0-9]*/{MANIFEST}"))


def refusal(words: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert main(words) == 2
    return " ".join(capsys.readouterr().err.split())


def damage_all(run: Path) -> None:
    for manifest in run.glob(f"checkpoints/*/{MANIFEST}"):
        manifest.write_text("{")


def test_with_all_checkpoints_damaged_a_run_starts_over_only_on_request(
    cut_words: Words, copy: Path, uninterrupted: Path, same_run: SameRun, capsys: Capture
) -> None:
    steps = saved_steps(copy)
    old_metrics = (copy / "metrics.jsonl").read_bytes()
    damage_all(copy)
    for _ in range(2):  # the second start finds only what the first one set aside
        capsys.readouterr()
        assert main(cut_words(copy)) == 1
        message = capsys.readouterr().err
        assert f"no checkpoint of the run in {copy} is whole" in message
        assert "--resume never" in message
    assert len(list(copy.glob("checkpoints/damaged-*"))) == len(steps)
    assert (copy / "metrics.jsonl").read_bytes() == old_metrics
    assert main(cut_words(copy, resume="never")) == 0
    same_run(copy, uninterrupted)
    assert len(list(copy.glob("checkpoints/damaged-*"))) == len(steps)
    (kept,) = copy.glob("metrics.before-*.jsonl")
    assert kept.read_bytes() == old_metrics


@pytest.mark.full
def test_a_run_that_started_over_is_resumed_as_any_other(
    cut_words: Words, copy: Path, capsys: Capture, jdpo_process: Start
) -> None:
    damage_all(copy)
    never = cut_words(copy, resume="never")
    process = jdpo_process(never, "SIGKILL", "jdpo.training.step_reports:StepReports.read", "before", 1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert saved_steps(copy) == []
    assert main(cut_words(copy)) == 0, "what was given up once is not asked about again"
    assert f"output_dir {copy} holds a run already, and resume is 'never'" in refusal(never, capsys)


@pytest.mark.parametrize("how", ["renamed", "beyond"])
def test_a_checkpoint_that_is_not_this_runs_is_refused_by_name(
    how: str, cut_words: Words, copy: Path, capsys: Capture
) -> None:
    newest = saved_steps(copy)[-1]
    other = copy / "checkpoints" / "1000"
    shutil.copytree(copy / "checkpoints" / str(newest), other)
    if how == "beyond":
        manifest = json.loads((other / MANIFEST).read_text())
        (other / MANIFEST).write_text(json.dumps(manifest | {"step": 1000}))
    message = refusal(cut_words(copy), capsys)
    assert f"{other} has the manifest of step {newest}" in message or f"{other} is a checkpoint of step 1000" in message
    assert saved_steps(copy)[-1] == 1000, "nothing was moved"


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(cut_words: Words, copy: Path, capsys: Capture) -> None:
    checkpoint = copy / "checkpoints" / str(saved_steps(copy)[-1])
    position, manifest = checkpoint / "position" / "metadata", checkpoint / MANIFEST
    position.write_text(position.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    files = json.loads(manifest.read_text())["files"] | {"position/metadata": digest_of(position)}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": files}))
    message = refusal(cut_words(copy), capsys)
    assert f"{checkpoint} was saved by another run" in message
    assert "beta: 0.2 before, 0.1 now" in message


@pytest.mark.parametrize("where", ["in between", "all of it"])
def test_damaged_metrics_are_named_and_kept_and_do_not_prevent_a_resume(
    where: str, cut_words: Words, copy: Path, uninterrupted: Path, same_run: SameRun, capsys: Capture
) -> None:
    path = copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    texts = [bytes(4096)] if where == "all of it" else [lines[0], b"hello\n", *lines[1:], b"[1]\n"]
    path.write_bytes(b"".join(texts))
    damaged = path.read_bytes()
    assert main(cut_words(copy)) == 0
    (kept,) = copy.glob("metrics.damaged-*.jsonl")
    assert kept.read_bytes() == damaged
    output = "".join("".join(capsys.readouterr()).split())
    assert "".join(f"{path} is damaged".split()) in output
    assert kept.name in output
    assert (copy / "plots" / "loss.png").is_file()
    if where == "all of it":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        # 9, since the signal broke off its evaluation, which the resumed run makes first.
        assert {line["step"] for line in lines} == {9, 10, 12}
    else:
        same_run(copy, uninterrupted)
