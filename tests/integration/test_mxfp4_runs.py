"""Whole runs that start from a folder with experts in MXFP4: full, LoRA over an int8 base, and questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jdpo.cli.main import main
from jdpo.generation.answer_files import read_answers
from jdpo.models.families import read_model_config
from tests.models.mxfp4_folders import write_folders

pytestmark = pytest.mark.full

Words = Callable[..., list[str]]
MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "max_steps": 2}
LORA = {"lora.r": 4, "lora.alpha": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folders(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The toy's tokenizer with a random gpt-oss, in MXFP4 and in bfloat16."""
    root = tmp_path_factory.mktemp("gpt_oss")
    toy = json.loads((toy_model / "config.json").read_text())
    kept = {key: toy[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in toy}
    for name in ("quantized", "plain"):
        shutil.copytree(toy_model, root / name)
    write_folders(root / "quantized", root / "plain", **kept)
    return root / "quantized", root / "plain"


def test_a_run_from_mxfp4_is_the_run_from_bfloat16(
    run_words: Words, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, logs = [], []
    for index, source in enumerate(folders):
        words = run_words(model_name_or_path=source, output_dir=tmp_path / str(index), **MESH)
        assert main(["dpo", *words]) == 0
        logs.append("".join(capsys.readouterr()))
        found.append(load_file(tmp_path / str(index) / "model" / "model.safetensors"))
    assert "MXFP4: they are dequantized to bfloat16" in " ".join(logs[0].split())
    assert "MXFP4" not in logs[1]
    source = load_file(folders[1] / "model.safetensors")
    assert set(found[0]) == set(source)
    for name, values in found[0].items():
        np.testing.assert_array_equal(values.view(np.uint16), found[1][name].view(np.uint16), err_msg=name)
    assert any(not np.array_equal(found[0][name], source[name]) for name in source if "experts.gate_up_proj" in name)
    out = tmp_path / "0" / "model"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert read_model_config(out) == read_model_config(folders[1])
    assert "are in MXFP4. They were dequantized: this one has them in bfloat16" in (out / "README.md").read_text()
    assert "MXFP4" not in (tmp_path / "1" / "model" / "README.md").read_text()


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8"])
def test_adapters_over_mxfp4(
    run_words: Words,
    folders: tuple[Path, Path],
    tmp_path: Path,
    base_dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trains adapters of all projections, experts included, exports them alone, merges them, and asks the model."""
    settings = {**MESH, **LORA, "lora.base_dtype": base_dtype, "lora.target_modules": "all-linear"}
    run = tmp_path / "run"
    words = run_words(model_name_or_path=folders[0], output_dir=run, **settings)
    assert main(["dpo", *words]) == 0
    adapter = json.loads((run / "model" / "adapter_config.json").read_text())
    assert adapter["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert adapter["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    trained = load_file(run / "model" / "adapter_model.safetensors")
    moved = trained["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"]
    assert moved.shape == (2 * 32, 4 * 4)
    assert np.abs(moved.astype(np.float32)).max() > 0
    assert "are in MXFP4. They were dequantized: the adapter" in (run / "model" / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--dtype", "float32"]) == 0
    assert "MXFP4: they are dequantized" in " ".join(capsys.readouterr().out.split())
    assert "has them in float32" in (tmp_path / "merged" / "README.md").read_text()
    merged, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", folders[1]))
    assert {name: values.shape for name, values in merged.items()} == {name: x.shape for name, x in source.items()}
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": [{"role": "user", "content": "one two"}]}\n')
    for folder in (run / "model", tmp_path / "merged", folders[0]):
        out = tmp_path / f"answers_{folder.name}"
        words = ["generate", str(folder), "--prompts", str(questions), "--output_dir", str(out)]
        assert main([*words, "--max-new-tokens", "4"]) == 0
        assert [answer.sample for answer in read_answers(out).answers] == [0]
