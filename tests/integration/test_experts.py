"""Whole runs of a model with experts: over expert meshes, with evaluation, to a folder that loads again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.cli.main import main
from jdpo.models.families import read_model_config
from jdpo.models.weights.hf_names import hf_tensors

Words = Callable[..., list[str]]

EXPERTS = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.05,
}


@pytest.fixture(scope="module")
def moe_model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's tokenizer with the random weights of a Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(toy_model, folder)
    config = json.loads((folder / "config.json").read_text()) | EXPERTS
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(read_model_config(folder)).items()}
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef 0.1: this llama model has no router; leave it out"),
        ({"mesh.data": 2, "mesh.expert": 4}, "mesh.expert 4: this llama model has no experts to split; use mesh.fsdp"),
    ],
)
def test_a_model_without_experts_refuses_their_settings(
    run_words: Words, settings: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dpo", *run_words(**settings)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_expert_axis_divides_the_experts(
    run_words: Words, moe_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((moe_model / "config.json").read_text()) | {"num_experts": 6}
    odd = moe_model.parent / "odd"
    shutil.copytree(moe_model, odd)
    (odd / "config.json").write_text(json.dumps(config))
    words = run_words(**{"model_name_or_path": odd, "mesh.data": 2, "mesh.expert": 4})
    assert main(["dpo", *words]) == 2
    assert "mesh.expert 4 does not divide the 6 experts of this qwen3_moe model" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.full
def test_runs_over_meshes_are_one_run(run_words: Words, moe_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    runs = {
        "data": {"mesh.data": 8},
        "mixed": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "micro_batch_size": 1},
    }
    found = {}
    for name, mesh in runs.items():
        run = tmp_path / name
        words = run_words(
            **{"model_name_or_path": moe_model, "eval_datasets": pairs_file, "output_dir": run, "max_steps": 2} | mesh
        )
        assert main(["dpo", *words]) == 0
        found[name] = lines_of(run)
    # The first line is the evaluation before the first step.
    first = next(line for line in found["data"] if "loss" in line)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert 2 <= first["aux_loss"] <= 8  # each token goes to two of eight experts
    compared = {"loss", "aux_loss", "grad_norm", "rewards/margins", "eval_loss", "eval_aux_loss"}
    seen = set()
    for line, expected in zip(found["mixed"], found["data"], strict=True):
        for key in compared & set(expected):
            assert line[key] == pytest.approx(expected[key], rel=1e-3, abs=3e-5), key
            seen.add(key)
    assert seen == compared
    names = set(load_file(moe_model / "model.safetensors"))
    assert set(load_file(tmp_path / "mixed" / "model" / "model.safetensors")) == names


@pytest.mark.full
def test_the_balancing_loss_balances(run_words: Words, moe_model: Path, tmp_path: Path) -> None:
    """Takes supervised steps with a large weight on the balancing loss, which must even out the load."""
    run = tmp_path / "run"
    words = run_words(
        **{"model_name_or_path": moe_model, "output_dir": run, "max_steps": 8, "router_aux_loss_coef": 10.0},
        **{"datasets": as_completions(tmp_path), "packing": False, "mesh.data": 8},
    )
    assert main(["sft", *words]) == 0
    balance = [line["aux_loss"] for line in lines_of(run)]
    assert balance[-1] < balance[0] - 0.01


def as_completions(folder: Path) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"word {index}"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
        for index in range(16)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
