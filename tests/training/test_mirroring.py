"""The mirror of a run from its start to its end, without the training in between."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jdpo.checkpoint.mirror.share_upload import LAST_ATTEMPTS
from jdpo.checkpoint.steps import MANIFEST, complete_steps, digests_of
from jdpo.config import DPOConfig
from jdpo.processes import PROGRESS
from jdpo.training.dry_run import describe_mirror
from jdpo.training.interrupt import StopRequest
from jdpo.training.mirroring import MirrorIncomplete, RunMirror, open_mirror
from jdpo.training.run_dir import RunDirectory

ROWS = {"the training rows": "a" * 64}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DPOConfig]:
    def settings(**changes: Any) -> DPOConfig:
        own = {"output_dir": str(tmp_path / "run"), "mirror": f"file://{tmp_path / 'mirror'}"}
        return DPOConfig(model_name_or_path="model", datasets=("pairs.jsonl",), **{**own, **changes})

    return settings


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def save(directory: RunDirectory, step: int) -> None:
    folder = directory.checkpoints / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_text(f"weights of step {step}")
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": digests_of(folder)}))
    with directory.metrics.open("a") as lines:
        lines.write(f'{{"step": {step}, "loss": 0.5}}\n')


def all_of(manifests: Mapping[int, Any]) -> Collection[int]:
    return list(manifests)


@contextlib.contextmanager
def opened(config: DPOConfig, log: Callable[[str], None]) -> Iterator[tuple[RunDirectory, RunMirror]]:
    with (
        RunDirectory(config, "dpo") as directory,
        StopRequest() as stop,
        open_mirror(config, directory, stop, log) as mirror,
    ):
        assert mirror is not None
        yield directory, mirror


def start(config: DPOConfig, log: Callable[[str], None], *steps: int, finishes: bool = False) -> int | None:
    """Makes a start of a run that saves after some steps; returns the step that it continues from."""
    with (
        RunDirectory(config, "dpo") as directory,
        StopRequest() as stop,
        open_mirror(config, directory, stop, log) as mirror,
    ):
        assert mirror is not None
        directory.check_inputs(ROWS, {})
        on_disk = complete_steps(directory.checkpoints)
        newest = mirror.fetch_newest(on_disk[-1] if on_disk else None, 100, config)
        mirror.follow(newest, all_of, lambda: None)
        for step in steps:
            save(directory, step)
            mirror.sealed()
        if finishes:
            directory.finish({"step": steps[-1]})
        return newest


def test_a_run_goes_on_from_its_mirror(config: Callable[..., DPOConfig], tmp_path: Path) -> None:
    lines: list[str] = []
    assert start(config(), lines.append, 1, 2) is None
    assert lines == []
    assert "would continue from the checkpoint of step 2" in describe_mirror(config(), "dpo")
    shutil.rmtree(tmp_path / "run")
    assert start(config(), lines.append, 3, finishes=True) == 2
    assert "fetching the checkpoint of step 2" in lines[0]
    assert lines[1].endswith("is complete")
    assert complete_steps(tmp_path / "mirror" / "checkpoints") == [1, 2, 3]
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert steps_in(tmp_path / "mirror" / "metrics.jsonl") == [1, 2, 3]
    record = json.loads((tmp_path / "mirror" / "run.json").read_text())
    assert record["finished"]
    assert record["mirror"] == {"address": config().mirror, "step": 3, "failures": 0}


def test_a_later_checkpoint_in_the_mirror_is_taken(config: Callable[..., DPOConfig], tmp_path: Path) -> None:
    start(config(), print, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    start(config(), print, 2)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "earlier").rename(tmp_path / "run")  # the disk of another machine
    assert start(config(), print) == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


def test_other_rows_are_refused_with_their_digests(config: Callable[..., DPOConfig], tmp_path: Path) -> None:
    start(config(), print, 1)
    other = config(output_dir=str(tmp_path / "other"))
    with RunDirectory(other, "dpo") as directory:
        assert not directory.is_new
        with pytest.raises(ValueError, match="Digests: the training rows aaaaaaaaaaaa then, bbbbbbbbbbbb now"):
            directory.check_inputs({"the training rows": "b" * 64}, {})
    # The folder of a refused run has none of its checkpoints, and is free for another one.
    with RunDirectory(config(output_dir=str(tmp_path / "other"), mirror=None, beta=0.7), "dpo") as directory:
        assert directory.is_new


def test_a_run_whose_first_start_failed_may_be_corrected(config: Callable[..., DPOConfig]) -> None:
    start(config(beta=0.7), print)  # ends without a checkpoint
    assert "holds no checkpoint" in describe_mirror(config(), "dpo")
    assert start(config(), print, 1) is None


def test_a_finished_run_that_exports_nothing_comes_back_with_its_last_checkpoint(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    start(config(export_at_end=False), print, 1, 2, finishes=True)
    with RunDirectory(config(export_at_end=False), "dpo") as directory:
        assert directory.finished
    shutil.rmtree(tmp_path / "run")
    with RunDirectory(config(export_at_end=False), "dpo") as directory:
        assert not directory.finished, "its checkpoint is in the mirror alone"
    assert start(config(export_at_end=False), print) == 2
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]
    with RunDirectory(config(export_at_end=False), "dpo") as directory:
        assert directory.finished


def test_the_last_records_are_uploaded_whatever_happened_to_an_earlier_checkpoint(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    noted = threading.Event()
    with opened(config(), lambda line: noted.set()) as (directory, mirror):
        mirror.follow(None, all_of, lambda: None)
        save(directory, 1)
        (directory.checkpoints / "1" / "state" / "data").write_text("damaged later!!")
        mirror.sealed()
        assert noted.wait(60), "it cannot be uploaded"
        shutil.rmtree(directory.checkpoints / "1")
        directory.finish({"step": 2})
    assert json.loads((tmp_path / "mirror" / "run.json").read_text())["finished"]


def test_the_watchdog_takes_uploads_for_progress_in_whatever_phase_a_run_ends(
    config: Callable[..., DPOConfig],
) -> None:
    try:
        with contextlib.suppress(FloatingPointError), opened(config(), print):
            PROGRESS.enter("step")
            raise FloatingPointError
        assert PROGRESS.phase == "save"
    finally:
        PROGRESS.begin()


def test_what_ends_a_run_is_told_also_where_its_folder_cannot_be_written(config: Callable[..., DPOConfig]) -> None:
    lines: list[str] = []

    def fails() -> None:
        with opened(config(), lines.append) as (directory, _):
            shutil.rmtree(directory.path / ".mirror")  # as a full disk: nothing can be written there
            raise OSError("the checkpoint of step 1 could not be written. Free some space")

    with pytest.raises(OSError, match="Free some space"):
        fails()
    assert "cannot be ended" in lines[-1]


def test_a_second_ctrl_c_does_not_wait_for_uploads(config: Callable[..., DPOConfig], tmp_path: Path) -> None:
    def is_interrupted() -> None:
        with (
            RunDirectory(config(), "dpo") as directory,
            StopRequest() as stop,
            open_mirror(config(), directory, stop, print) as mirror,
        ):
            assert mirror is not None
            (tmp_path / "mirror" / "checkpoints").write_text("where a folder has to be: no upload succeeds")
            mirror.follow(None, all_of, lambda: None)
            save(directory, 1)
            stop.interrupt()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_interrupted()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["mirror"].get("failures", 0) < 2, "it is not tried again"


@pytest.mark.ci  # it waits for the pauses between five attempts
def test_a_finished_run_that_could_not_be_copied_says_so(config: Callable[..., DPOConfig], tmp_path: Path) -> None:
    start(config(), print, 1)
    shutil.rmtree(tmp_path / "mirror" / "checkpoints")
    (tmp_path / "mirror" / "checkpoints").write_text("where a folder has to be")
    lines: list[str] = []
    with pytest.raises(
        MirrorIncomplete, match=r"finished, but the mirror .* lacks the checkpoints of step 1, 2"
    ) as error:
        start(config(), lines.append, 2, finishes=True)
    assert error.value.exit_code == 1
    assert sum("not up to date" in line for line in lines) == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    assert record["mirror"]["failures"] >= LAST_ATTEMPTS, "and those before the run ended"
    (tmp_path / "mirror" / "checkpoints").unlink()
    with (
        RunDirectory(config(), "dpo") as directory,
        StopRequest() as stop,
        open_mirror(config(), directory, stop, print),
    ):
        pass  # as a start of a finished run
    assert complete_steps(tmp_path / "mirror" / "checkpoints") == [1, 2]


def test_a_mirror_that_cannot_be_written_is_an_error_at_the_start(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    (tmp_path / "mirror").write_text("where a folder has to be")
    with pytest.raises(OSError, match=r"cannot be used: .*resolved_config.*rights in the bucket"):
        start(config(), print)
