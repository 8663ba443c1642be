"""`jdpo export` on the checkpoints of real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jdpo.cli.main import main
from tests.conftest import chat_pairs, write_jsonl

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("exported")
    values = {
        "model_name_or_path": toy_model,
        "datasets": write_jsonl(folder / "pairs.jsonl", chat_pairs(20)),
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "max_length": 64,
        "global_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "remat": "none",
        "reference": "live",
        "save_steps": 3,
        "logging_steps": 1,
        "mesh.data": 8,
        "mesh.fsdp": 1,
    }
    assert main(["dpo", *(f"{key}={value}" for key, value in values.items())]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refusal(words: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["export", *words]) == 2
    return capsys.readouterr().err


def test_the_newest_step_gives_the_model_of_the_run(run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert f"exporting step 6 of {run} to {out}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    names = sorted(path.name for path in (run / "model").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (run / "model" / name).read_bytes(), name


def test_an_earlier_step_by_its_folder_or_by_number(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run / "checkpoints" / "3"), str(tmp_path / "by_folder")]) == 0
    words = [str(run), str(tmp_path / "by_number"), "--step", "3", "--dtype", "float16", "--max_shard_size", "50KB"]
    assert main(["export", *words]) == 0
    one = load_file(tmp_path / "by_folder" / "model.safetensors")
    index = json.loads((tmp_path / "by_number" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    last = load_file(run / "model" / "model.safetensors")
    assert one.keys() == index["weight_map"].keys() == last.keys()
    for name, file_name in index["weight_map"].items():
        np.testing.assert_array_equal(
            load_file(tmp_path / "by_number" / file_name)[name], one[name].astype(np.float16), err_msg=name
        )
    assert any((one[name] != last[name]).any() for name in one)
    card = (tmp_path / "by_folder" / "README.md").read_text()
    assert "| step | 3 |" in card
    assert "The run did not write down" not in card


def test_what_is_no_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert "is no checkpoint: expected the output_dir of a run" in refusal([str(tmp_path), str(out)], capsys)
    assert "no whole checkpoint of step 4; it has 3, 6" in refusal([str(run), str(out), "--step", "4"], capsys)
    step = str(run / "checkpoints" / "3")
    assert "is step 3; leave --step out" in refusal([step, str(out), "--step", "6"], capsys)
    assert "--public says how --push_to_hub" in refusal([step, str(out), "--public"], capsys)
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "is not a model folder: it will not be replaced" in refusal([step, str(out)], capsys)
    array = max((run / "checkpoints" / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    assert f"{array.name} is not what was written" in refusal([step, str(tmp_path / "other")], capsys)
    assert not (tmp_path / "other").exists()
