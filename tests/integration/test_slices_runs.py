"""A run on two slices of fake devices is the run of one slice, and continues on one slice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jdpo import RunView
from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from tests.run_stops import EachStep

ONE = {"mesh.data": 1, "mesh.fsdp": -1, "global_batch_size": 16, "max_steps": 4, "compute_dtype": "float32"}
TWO = ONE | {"mesh.slices": 2, "micro_batch_size": 1}


def stop_after_two(run: RunView) -> None:
    if run.step == 2:
        run.stop("two steps on two slices")


@pytest.mark.ci
def test_two_slices_train_as_one_and_continue_on_one(
    run_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *callbacks: EachStep, **settings: object) -> Path:
        words = run_words(output_dir=tmp_path / name, num_train_epochs=4, **settings)
        train(load_config(DPOConfig, None, words), callbacks=callbacks)
        return tmp_path / name

    def losses(folder: Path) -> list[float]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    whole = run("whole", **ONE)
    run("moved", EachStep(stop_after_two), **TWO)
    assert "mesh: data=2 x fsdp=4 x expert=1 x tensor=1 over 8 cpu devices, in 2 slices" in "".join(capsys.readouterr())
    moved = run("moved", **ONE)
    assert "resuming from the checkpoint of step 2" in "".join(capsys.readouterr())
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-4)
    assert abs(losses(whole)[-1] / losses(whole)[0] - 1) > 0.01
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (whole, moved))
    for name in before:
        np.testing.assert_allclose(after[name].astype(np.float32), before[name].astype(np.float32), atol=1e-3)
