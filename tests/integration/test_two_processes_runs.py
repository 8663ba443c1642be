"""Adapters and experts trained by two processes on loopback give the numbers and files of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.models.families import read_model_config
from jdpo.models.weights.hf_names import hf_tensors
from jdpo.reports.metrics_file import read_metrics
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import run_cluster
from tests.models.mxfp4_folders import write_folders

PROGRAM = Path(__file__).parent / "train_by_two.py"

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "router_aux_loss_coef": 0.05,
}
LORA = {"lora.r": 2, "lora.alpha": 4, "mesh.fsdp": 4, "mesh.tensor": 2}
SAMPLED = {"sample_prompts": '["green paper"]', "sample_steps": 1, "sample_max_new_tokens": 4}
RUNS: dict[str, dict[str, Any]] = {
    "lora": LORA | SAMPLED,
    "int8": LORA | {"lora.base_dtype": "int8"},
    "experts": {"mesh.data": 2, "mesh.expert": 4},
    # All experts of a layer in one tensor, of which each process reads its own part.
    "mxfp4": {"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "export_dtype": "float32"},
}


@pytest.fixture(scope="module")
def mixtral(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's tokenizer with the random weights of a Mixtral."""
    folder = Path(shutil.copytree(toy_model, tmp_path_factory.mktemp("mixtral") / "model"))
    config = json.loads((folder / "config.json").read_text()) | MIXTRAL
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(read_model_config(folder)).items()}
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def gpt_oss(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's tokenizer with the random weights of a gpt-oss, experts in MXFP4."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    shutil.copytree(toy_model, folder / "model")
    vocab_size = json.loads((toy_model / "config.json").read_text())["vocab_size"]
    write_folders(folder / "model", folder / "plain", vocab_size=vocab_size)
    return folder / "model"


@pytest.fixture(scope="module")
def runs(toy_model: Path, mixtral: Path, gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder NAME-COUNT for each run, made by one process and by two."""
    folder, models = tmp_path_factory.mktemp("runs"), {"experts": mixtral, "mxfp4": gpt_oss}
    pairs = write_jsonl(
        folder / "pairs.jsonl", chat_pairs(16, words=(6, 7))
    )  # rows of one length need one shape to compile

    def words(name: str, count: int) -> list[str]:
        values: Mapping[str, Any] = {
            "model_name_or_path": models.get(name, toy_model),
            "datasets": pairs,
            "output_dir": folder / f"{name}-{count}",
            "cache_dir": folder / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "remat": "none",
            "reference": "live",
            "mesh.data": 1,
            "mesh.fsdp": 1,
        } | RUNS[name]
        return [f"{key}={value}" for key, value in values.items()]

    for count in (1, 2):
        command: list[object] = [PROGRAM]
        for name in RUNS:
            command += [*words(name, count), "--"]
        ends = run_cluster([command[:-1]] * count)
        assert [end.code for end in ends] == [0] * count, ends
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs: Path, name: str) -> None:
    one, two = (read_metrics(runs / f"{name}-{count}" / "metrics.jsonl") for count in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    assert abs(one[1]["loss"] - one[0]["loss"]) > 1e-3, "it trained"
    for line, expected in zip(two, one, strict=True):
        for key in ("loss", "aux_loss", "rewards/margins", "grad_norm"):
            if key in expected:
                assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_export_as_one(runs: Path, name: str) -> None:
    file_name = "adapter_model.safetensors" if "lora.r" in RUNS[name] else "model.safetensors"
    one, two = (load_file(runs / f"{name}-{count}" / "model" / file_name) for count in (1, 2))
    assert one.keys() == two.keys()
    for key, values in one.items():
        np.testing.assert_allclose(two[key], values, atol=1e-5, err_msg=key)
    files = [sorted(path.name for path in (runs / f"{name}-{count}" / "model").iterdir()) for count in (1, 2)]
    assert files[0] == files[1]


@pytest.mark.full
def test_two_processes_write_the_answers_of_one(runs: Path) -> None:
    one, two = (
        [json.loads(line) for line in (runs / f"lora-{count}" / "samples.jsonl").read_text("utf-8").splitlines()]
        for count in (1, 2)
    )
    assert [line["step"] for line in one] == [0, 1, 2]
    assert [line.pop("logp") for line in two] == pytest.approx([line.pop("logp") for line in one], abs=1e-3)
    assert one == two
