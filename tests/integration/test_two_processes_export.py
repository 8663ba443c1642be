"""Two processes on loopback load a model and export it together; what one cannot do, both refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.json_files import read_json, write_json
from jdpo.models.families import read_model_config
from jdpo.models.weights.hf_names import hf_tensors
from tests.golden_models import GOLDEN_MODELS
from tests.integration.cluster import run_cluster

PROGRAM = Path(__file__).parent / "export_by_two.py"

REFUSED = {
    "NaN on the second": r"tensor model\.layers\.0\.mlp\.up_proj\.weight in .* holds NaN or Inf: the model is damaged",
    "no folder on the second": r"model folder .*/none does not exist",
    "small files": "File too large",
    "no threads": "can't start new thread",
    "a disk of its own": "No such file or directory",
}


@pytest.fixture(scope="module")
def out(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes wrote to, with what each printed for each case."""
    folder = tmp_path_factory.mktemp("by_two")
    damaged = Path(shutil.copytree(toy_model, folder / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = np.nan
    save_file(tensors, damaged / "model.safetensors")
    (folder / "out").mkdir()
    ends = run_cluster([[PROGRAM, toy_model, damaged, folder / "out", folder]] * 2)
    assert [end.code for end in ends] == [0, 0], ends
    return folder / "out"


def messages_of(out: Path, case: str) -> list[str | None]:
    return [json.loads((out.parent / str(index)).read_text())[case] for index in range(2)]


@pytest.mark.full
def test_two_processes_write_the_files_in_turn(toy_model: Path, out: Path) -> None:
    assert messages_of(out, "whole") == [None, None]
    index = json.loads((out / "whole" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    source = load_file(toy_model / "model.safetensors")
    assert index["weight_map"].keys() == source.keys()
    for name, file_name in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(out / "whole" / file_name)[name], source[name], err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_second_process_cannot_do_both_refuse(out: Path, case: str) -> None:
    first, second = messages_of(out, case)
    assert second is not None
    assert re.search(REFUSED[case], second)
    assert first == f"process 1 of this run has failed: {second}"


@pytest.mark.full
def test_the_process_that_has_a_tensor_with_inf_names_it(out: Path) -> None:
    texts = messages_of(out, "Inf")
    own = "tensor model.norm.weight holds NaN or Inf: this model is not exported"
    assert own in texts
    assert f"process {texts.index(own)} of this run has failed: {own}" in texts


@pytest.mark.full
def test_refused_exports_leave_no_files(out: Path) -> None:
    assert [path.name for path in out.iterdir()] == ["whole"]


@pytest.mark.full
def test_two_processes_share_out_carried_tensors(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = read_json(GOLDEN_MODELS / "gemma3" / "config.json")
    config["text_config"]["vocab_size"] = read_json(toy_model / "config.json")["vocab_size"]
    write_json(folder / "config.json", config)
    rng = np.random.default_rng(0)
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(read_model_config(folder)).items()}
    text = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    tower = {f"vision_tower.{index}": rng.integers(0, 99, (30, 50)) for index in range(8)}
    save_file(text | tower, folder / "model.safetensors")
    ends = run_cluster([[PROGRAM.with_name("carry_by_two.py"), folder, tmp_path / "out"]] * 2)
    assert [end.code for end in ends] == [0, 0], ends
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert len({weight_map[name] for name in tower}) == 8  # every second file is the other process's
    for name, before in (text | tower).items():
        after = load_file(tmp_path / "out" / weight_map[name])[name]
        np.testing.assert_array_equal(after, before if name in tower else before + 1, err_msg=name)
