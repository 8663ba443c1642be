"""output_dir: the run that it holds, and whether a start may continue it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jdpo.checkpoint.steps import MANIFEST, digests_of
from jdpo.config import SFTConfig, differences, load_config, to_dict
from jdpo.training.run_dir import RunDirectory


def config(folder: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(
        **{"model_name_or_path": "model", "datasets": "rows.jsonl", "output_dir": str(folder), "max_steps": 4} | changes
    )


@contextlib.contextmanager
def opened(folder: Path, command: str = "sft", **changes: Any) -> Iterator[RunDirectory]:
    with closing(RunDirectory(config(folder, **changes), command)) as directory:
        yield directory


def is_new(folder: Path, **changes: Any) -> bool:
    with opened(folder, **changes) as directory:
        return directory.is_new


def save_step(folder: Path, step: int) -> Path:
    place = folder / "checkpoints" / str(step)
    place.mkdir(parents=True)
    (place / "state").write_text("weights")
    (place / MANIFEST).write_text(json.dumps({"step": step, "files": digests_of(place)}))
    return place


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has logged one step."""
    folder = tmp_path / "run"
    assert is_new(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_a_report_that_looks_at_the_folder_refuses_no_start(run: Path) -> None:
    with (run / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        looked = threading.Timer(0.1, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        looked.start()
        assert not is_new(run)
        looked.join()


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints", "model"])
def test_a_start_that_left_files_is_continued(left: str, tmp_path: Path) -> None:
    assert is_new(tmp_path)
    assert is_new(tmp_path)  # a folder whose run was refused or killed before it left anything is free
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    assert is_new(tmp_path, learning_rate=1.0)
    if left == "metrics.jsonl":
        (tmp_path / left).write_text("{}\n")
    elif left == "checkpoints":
        save_step(tmp_path, 1)
    else:
        (tmp_path / left).mkdir()
    assert not is_new(tmp_path, learning_rate=1.0)


def test_a_start_that_is_refused_notes_why(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def start(error: BaseException) -> dict[str, Any]:
        with pytest.raises(type(error)), RunDirectory(config(folder), "sft"):
            raise error
        record: dict[str, Any] = json.loads((folder / "run.json").read_text())
        return record

    refused = start(ValueError("no tracker of this name"))
    assert (refused["ended"], refused["end_reason"]) == ("failed", "ValueError: no tracker of this name")
    stopped = start(KeyboardInterrupt())
    assert stopped["ended"] == "stopped"
    assert stopped.get("end_reason") is None
    with RunDirectory(config(folder), "sft") as directory:  # unlocked
        directory.metrics.write_text('{"step": 1}\n')
        directory.finish({})
    assert "ended" not in start(ValueError("another call"))


def test_rows_of_another_kind_are_named_when_a_run_is_resumed(tmp_path: Path) -> None:
    as_list, as_dataset, other = (
        load_config(SFTConfig, None, ["model_name_or_path=m", f"output_dir={tmp_path}", f"datasets={tmp_path}/{name}"])
        for name in ("train_dataset.jsonl", "train_dataset.arrow", "other.arrow")
    )
    (line,) = differences(to_dict(as_list), as_dataset)
    assert "as a list before, and now as a datasets.Dataset: give the same kind" in line
    (line,) = differences(to_dict(as_list), other)
    assert "the same kind" not in line


def test_another_run_is_refused_with_its_differences(run: Path) -> None:
    with pytest.raises(ValueError, match="different run") as refused, opened(run, learning_rate=1.0):
        pass
    assert "learning_rate" in str(refused.value)
    with pytest.raises(ValueError, match="of `jdpo sft`, not of `jdpo dpo`"), opened(run, "dpo"):
        pass
    with pytest.raises(ValueError, match="resume is 'never'"), opened(run, resume="never"):
        pass
    assert not is_new(run, logging_steps=7)


@pytest.mark.parametrize("name", ["run.json", "resolved_config.yaml"])
def test_a_folder_without_the_files_of_a_run_is_refused(name: str, run: Path) -> None:
    (run / name).unlink()
    with pytest.raises(ValueError, match="of something else"), opened(run):
        pass


def test_a_run_json_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "sft"}')
    with pytest.raises(ValueError, match=r"run.json of something else"), opened(tmp_path):
        pass


def test_checkpoints_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match="is a file"), opened(tmp_path):
        pass


def test_a_finished_run_can_not_be_made_longer(run: Path) -> None:
    with pytest.raises(ValueError, match="different run"), opened(run, max_steps=8):
        pass  # nor can an unfinished one, for another reason
    with opened(run) as directory:
        assert not directory.finished
        directory.finish({"step": 4})
        assert not directory.finished  # its model is missing
        directory.model.mkdir()
        assert directory.finished
    with pytest.raises(ValueError, match="To train this model further"), opened(run, max_steps=8):
        pass
    with pytest.raises(ValueError, match="of another length, choose another output_dir"), opened(run, max_steps=2):
        pass
    with pytest.raises(ValueError, match="different run"), opened(run, max_steps=8, learning_rate=1.0):
        pass
    with opened(run, export_dtype="bfloat16") as directory:
        assert not directory.finished  # it is exported again


@pytest.mark.parametrize(
    ("fault", "starts_over"),
    [("none", False), ("damaged", True), ("set aside", True), ("other step", False), ("model", False)],
)
def test_resume_never_starts_over_only_where_all_checkpoints_are_damaged(
    fault: str, starts_over: bool, run: Path
) -> None:
    place = save_step(run, 2)
    if fault in ("damaged", "set aside", "model"):
        (place / "state").write_text("w")
    if fault == "set aside":
        place.rename(place.with_name("damaged-2-now"))
    if fault == "other step":  # it belongs to another run
        place.rename(place.with_name("3"))
    if fault == "model":
        (run / "model").mkdir()
    if not starts_over:
        with pytest.raises(ValueError, match="resume is 'never'"), opened(run, resume="never"):
            pass
        return
    assert is_new(run, resume="never")
    assert not (run / "metrics.jsonl").exists()
    (kept,) = run.glob("metrics.before-*.jsonl")
    assert kept.read_text() == '{"step": 1}\n'


def test_a_whole_checkpoint_next_to_a_damaged_one_is_not_started_over(run: Path) -> None:
    save_step(run, 2)
    (save_step(run, 3) / "state").write_text("w")
    with pytest.raises(ValueError, match="resume is 'never'"), opened(run, resume="never"):
        pass


def test_inputs_that_changed_are_named(run: Path) -> None:
    with opened(run) as directory:
        directory.check_inputs({"the model": "m", "the rows": "r"}, {"a.jsonl": "a", "b.jsonl": "b"})
        directory.check_inputs({"the model": "m", "the rows": "r"}, {"a.jsonl": "A", "c.jsonl": "c"})  # the same rows
        directory.check_inputs({"another input": "x"}, {"a.jsonl": "a", "b.jsonl": "b"})
        assert directory.record.inputs == {"the model": "m", "the rows": "r", "another input": "x"}
        with pytest.raises(ValueError, match="the content of the rows has changed") as refused:
            directory.check_inputs({"the model": "m", "the rows": "R"}, {"a.jsonl": "A", "c.jsonl": "c"})
        message = str(refused.value)
        assert message.endswith("Files that changed: a.jsonl, b.jsonl (no longer read), c.jsonl (new)")
        with pytest.raises(ValueError, match="of the model and of the rows has changed") as refused:
            directory.check_inputs({"the model": "M", "the rows": "R"}, {"a.jsonl": "a", "b.jsonl": "b"})
        assert "Files" not in str(refused.value)
        assert directory.record.inputs["the model"] == "m"


def test_files_are_not_called_new_if_the_run_recorded_none(run: Path) -> None:
    with opened(run) as directory:
        directory.check_inputs({"the rows": "r"}, {})
        with pytest.raises(ValueError, match="the rows has changed") as refused:
            directory.check_inputs({"the rows": "R"}, {"a.jsonl": "a"})
        assert "a.jsonl" not in str(refused.value)
