"""Stopping by signal, resuming, and which starts a used output_dir accepts and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from jdpo.checkpoint.steps import MANIFEST
from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.numerics import resolve_dtype
from tests.run_stops import SignalAt

Words = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]
SameRun = Callable[[Path, Path], None]
Capture = pytest.CaptureFixture[str]

LAST_STEP, STOPPED_AT = 12, 9  # see the fixtures `uninterrupted` and `copy`


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in run.glob(f"checkpoints/[0-9]*/{MANIFEST}"))


@pytest.mark.full
def test_a_run_with_offloaded_moments_resumes_to_the_same_end(
    cut_words: Words, same_run: SameRun, jdpo_process: Start, tmp_path: Path
) -> None:
    assert main(cut_words(tmp_path / "whole", offload_optimizer="true")) == 0
    words = cut_words(tmp_path / "cut", offload_optimizer="true")
    process = jdpo_process(words, "SIGKILL", "jdpo.training.step_reports:StepReports.read", "before", 3)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert saved_steps(tmp_path / "cut")[-1] < 12
    assert main(words) == 0
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_stopped_run_resumes_to_the_same_end(
    cut_words: Words, copy: Path, uninterrupted: Path, same_run: SameRun, capsys: Capture
) -> None:
    assert saved_steps(copy)[-1] == STOPPED_AT
    before = json.loads((copy / "run.json").read_text(encoding="utf-8"))["timing"]
    assert main(cut_words(copy)) == 0
    assert f"resuming from the checkpoint of step {STOPPED_AT}" in "".join(capsys.readouterr())
    same_run(copy, uninterrupted)
    record = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    assert all(record["timing"][phase] > seconds for phase, seconds in before.items() if phase != "data_wait")
    assert set(record["timing"]) - set(before) == {"export"}
    assert record["late_programs"] == 0


def test_an_evaluation_that_a_signal_broke_off_is_made_by_the_next_start(
    cut_words: Words, uninterrupted: Path, same_run: SameRun, tmp_path: Path
) -> None:
    """After the last step: there is nothing left to train, and the best checkpoint may depend on the evaluation."""
    run = tmp_path / "run"
    result = train(load_config(DPOConfig, None, cut_words(run)[1:]), callbacks=[SignalAt(LAST_STEP)])
    assert (result.step, result.exit_code) == (LAST_STEP, 143)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line["step"] == LAST_STEP and "eval_loss" in line] == []
    manifest = run / f"checkpoints/{LAST_STEP}/{MANIFEST}"
    assert json.loads(manifest.read_text(encoding="utf-8"))["metric"] is None
    assert main(cut_words(run)) == 0
    assert json.loads(manifest.read_text(encoding="utf-8"))["metric"] > 0
    # Only position.json tells that the evaluation came later.
    same_run(run, uninterrupted)


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(
    cut_words: Words,
    copy: Path,
    uninterrupted: Path,
    same_run: SameRun,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    *_, before, newest = saved_steps(copy)
    victim = max((path for path in (copy / f"checkpoints/{newest}/state").rglob("*") if path.is_file()), key=_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert main(cut_words(copy)) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "jdpo.checkpoint.steps"]
    fault = f"{victim.relative_to(copy / f'checkpoints/{newest}')} has changed since it was written"
    assert f"{copy}/checkpoints/{newest} is damaged ({fault})" in warning
    assert len(list(copy.glob(f"checkpoints/damaged-{newest}-*/{MANIFEST}"))) == 1
    output = " ".join("".join(capsys.readouterr()).split())
    assert f"resuming from the checkpoint of step {before}" in output
    same_run(copy, uninterrupted)


def _size(path: Path) -> int:
    return path.stat().st_size


def test_logging_saving_mesh_and_micro_batches_may_change(cut_words: Words, copy: Path, uninterrupted: Path) -> None:
    changes = {
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 5,
        "save_total_limit": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "mesh.slices": 2,
        "micro_batch_size": 1,
        "export_dtype": "float32",
        "remat": "full",
    }
    assert main(cut_words(copy, **changes)) == 0
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 5, 10, 11, 12]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 9, 10, 11, 12]
    (end,) = [line for line in lines if line["step"] == 12 and "eval_loss" in line]
    expected = json.loads((uninterrupted / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert end["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    assert saved_steps(copy)[-1] == 12


def test_a_finished_run_says_so_and_changes_nothing(cut_words: Words, uninterrupted: Path, capsys: Capture) -> None:
    touched = ("resolved_config.yaml", ".lock")  # written again at every start
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name not in touched}
    assert main(cut_words(uninterrupted)) == 0
    output = " ".join("".join(capsys.readouterr()).split())
    assert f"is finished (step 12): model in {uninterrupted / 'model'}" in output
    after = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name not in touched}
    assert after == before


def test_a_run_that_exports_nothing_can_export_later(run_words: Words, tmp_path: Path, capsys: Capture) -> None:
    words = ["dpo", *run_words(max_steps=1, export_at_end="false")]
    assert main(words) == 0
    run = tmp_path / "run"
    assert not ({"model", "plots"} & {path.name for path in run.iterdir()})
    capsys.readouterr()
    assert main(words) == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert f"is finished (step 1): checkpoints in {run / 'checkpoints'}" in printed
    assert main([*words, "export_at_end=true"]) == 0
    assert (run / "model" / "model.safetensors").is_file()


def test_a_finished_run_asked_for_more_steps_tells_how_to_train_further(
    cut_words: Words, uninterrupted: Path, capsys: Capture
) -> None:
    message = refusal(cut_words(uninterrupted, num_train_epochs=7), capsys)
    assert "is finished, and its learning rate has followed its schedule to the end" in message
    assert "num_train_epochs: 4.0 before, 7.0 now" in message
    base = dict(word.split("=", 1) for word in cut_words(uninterrupted)[1:])["model_name_or_path"]
    assert (
        f"`--model_name_or_path {uninterrupted / 'model'} --output_dir NEW_FOLDER --reference_model {base}`" in message
    )
    assert "holds a different run" in refusal(cut_words(uninterrupted, num_train_epochs=7, beta=0.2), capsys)


def test_a_deleted_model_is_exported_again(
    cut_words: Words, uninterrupted: Path, same_run: SameRun, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    shutil.rmtree(run / "model")
    assert main(cut_words(run)) == 0
    same_run(run, uninterrupted)


def refusal(words: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert main(words) == 2
    return " ".join(capsys.readouterr().err.split())


def test_another_config_is_refused_key_by_key(cut_words: Words, copy: Path, capsys: Capture) -> None:
    config = (copy / "resolved_config.yaml").read_bytes()
    message = refusal(cut_words(copy, beta=0.2, learning_rate=5e-7, logging_steps=1), capsys)
    assert f"output_dir {copy} holds a different run, so this one cannot resume it" in message
    assert "beta: 0.1 before, 0.2 now" in message
    assert "learning_rate: 0.001 before, 5e-7 now" in message
    assert "logging_steps" not in message
    assert "Undo these, or choose another output_dir" in message
    assert (copy / "resolved_config.yaml").read_bytes() == config


def test_another_command_is_refused(cut_words: Words, copy: Path, capsys: Capture) -> None:
    message = refusal(["sft", *cut_words(copy)[1:]], capsys)
    assert f"output_dir {copy} holds a run of `jdpo dpo`, not of `jdpo sft`" in message


def test_resume_never_refuses_a_used_folder(cut_words: Words, copy: Path, capsys: Capture) -> None:
    assert f"output_dir {copy} holds a run already, and resume is 'never'" in refusal(
        cut_words(copy, resume="never"), capsys
    )


def test_a_folder_of_something_else_is_refused(cut_words: Words, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model").mkdir()
    assert f"output_dir {tmp_path} holds model of something else" in refusal(cut_words(tmp_path), capsys)


@pytest.fixture
def own_inputs(cut_words: Words, tmp_path: Path) -> dict[str, Path]:
    """Copies of the model and the rows, for a test that changes them."""
    values = dict(word.split("=", 1) for word in cut_words(tmp_path)[1:])
    model = Path(shutil.copytree(values["model_name_or_path"], tmp_path / "own_model"))
    rows = Path(shutil.copy(values["datasets"], tmp_path / "own_rows.jsonl"))
    return {"model_name_or_path": model, "datasets": rows}


def test_changed_inputs_are_refused_and_named(
    cut_words: Words, own_inputs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    run, rows = tmp_path / "run", own_inputs["datasets"]
    words = cut_words(run, **own_inputs)

    assert train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(6)]).exit_code == 143
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "stopped by a signal; step 6 is saved" in printed
    content = rows.read_text(encoding="utf-8")
    rows.write_text(content.replace("river", "paper"), encoding="utf-8")
    message = refusal(words, capsys)
    assert "the content of the training rows has changed" in message
    assert f"Files that changed: {rows}" in message
    rows.write_text(content, encoding="utf-8")
    weights = own_inputs["model_name_or_path"] / "model.safetensors"
    _change_last_byte(weights)
    assert f"the content of the model {own_inputs['model_name_or_path']} has changed" in refusal(words, capsys)


def test_another_evaluation_set_is_refused_and_named(
    cut_words: Words, copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = dict(word.split("=", 1) for word in cut_words(copy)[1:])["eval_datasets"]
    other = tmp_path / "other.jsonl"
    rows = Path(before).read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(rows[1:]), encoding="utf-8")
    message = refusal(cut_words(copy, eval_datasets=other), capsys)
    assert (
        f"cannot resume the run in {copy}: since it started, the content of the evaluation rows has changed" in message
    )
    assert f"Files that changed: {before} (no longer read), {other} (new)" in message


def _change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in the mantissa of the last float32
    path.write_bytes(content)


def test_a_signal_before_the_first_step_trains_nothing(
    cut_words: Words, uninterrupted: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jdpo.training import run

    build = run.build

    def build_and_stop(*args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "build", build_and_stop)
    assert main(cut_words(tmp_path / "run")) == 143
    assert (
        "stopped by a signal before the first step; what was computed is kept. Run the same command again"
        in " ".join("".join(capsys.readouterr()).split())
    )
    assert not saved_steps(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_refused_start_leaves_the_folder_free(cut_words: Words, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    refusal(cut_words(run, model_name_or_path=tmp_path / "nowhere"), capsys)
    # With that mistake repaired, the next refusal must be about the next mistake, not about the folder.
    message = refusal(cut_words(run, max_length=1), capsys)
    assert "no rows left of " in message


def test_other_export_settings_export_a_finished_run_again(
    cut_words: Words, uninterrupted: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_bytes()
    assert main(cut_words(run, export_dtype="bfloat16")) == 0
    tensors = load_file(run / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert (run / "metrics.jsonl").read_bytes() == lines
    assert main(cut_words(run, export_dtype="bfloat16")) == 0
    assert "is finished" in "".join(capsys.readouterr())


def test_a_damaged_best_checkpoint_is_not_exported(
    cut_words: Words, uninterrupted: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    best, last = saved_steps(run)[0], saved_steps(run)[-1]
    for step in (best, last):  # makes the earlier checkpoint the best one
        path = run / "checkpoints" / str(step) / MANIFEST
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"metric": float(step)}))
        name = manifest["metric_name"]
    manifest = json.loads((run / "checkpoints" / str(last) / MANIFEST).read_text())
    for path in run.glob(f"checkpoints/*/{MANIFEST}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metric_name": name}))
    state = max((run / "checkpoints" / str(best) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(bytes(data))
    shutil.rmtree(run / "model")
    words = cut_words(run, load_best_model_at_end="true", eval_steps=2)
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert f"checkpoints/{best} is damaged: " in errors
    assert state.name in errors
    assert not (run / "model").exists()


def test_a_second_start_in_the_same_folder_is_refused(cut_words: Words, copy: Path, capsys: Capture) -> None:
    config = resolve_dtype(load_config(DPOConfig, None, cut_words(copy)[1:]))
    held = RunDirectory(config, "dpo")
    assert main(cut_words(copy)) == 2
    errors = capsys.readouterr().err
    assert f"output_dir {copy} is in use by process {os.getpid()} on " in errors
    held.close()
    again = RunDirectory(config, "dpo")
    again.close()


@pytest.mark.parametrize("name", ["run.json", "resolved_config.yaml"])
def test_damaged_run_files_are_named(name: str, cut_words: Words, copy: Path, capsys: Capture) -> None:
    (copy / name).write_text("")
    assert main(cut_words(copy)) == 2
    errors = capsys.readouterr().err
    assert str(copy / name) in errors
    assert "bring it back, or choose another output_dir" in errors


def test_weights_that_are_not_finite_are_never_saved(cut_words: Words, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    # The update itself overflows: loss and gradient are fine until then.
    absurd = {"learning_rate": 1e30, "optimizer.weight_decay": 1e20, "lr_scheduler_type": "constant"}
    words = cut_words(run, max_steps=1, **absurd)
    assert main(words) == 1
    errors = capsys.readouterr().err
    assert "step 1 gave loss 0.69" in errors
    assert "the updated weights contain NaN or Inf" in errors
    assert saved_steps(run) == []
    assert not (run / "model").exists()


def test_float64_ends_with_its_run(cut_words: Words, tmp_path: Path) -> None:
    before = (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)
    words = cut_words(tmp_path / "run", compute_dtype="float64", max_steps=1)
    train(load_config(DPOConfig, None, words[1:]))
    assert (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision) == before
    assert before[0] is False
