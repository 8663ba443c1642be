"""Dry runs of every config of configs/, with the shapes of its model, a toy tokenizer and no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdpo.cli.main import main
from tests.conftest import chat_pairs, write_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"

LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shapes(
    family: str, width: int, mlp: int, layers: int, heads: int, vocabulary: int, **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **fields,
    }


LLAMA_8B = shapes(
    "llama",
    4096,
    14336,
    32,
    32,
    128256,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=LLAMA_31_ROPE,
    tie_word_embeddings=False,
)
LLAMA_70B = LLAMA_8B | shapes("llama", 8192, 28672, 80, 64, 128256)
LLAMA_1B = shapes(
    "llama",
    2048,
    8192,
    16,
    32,
    128256,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=LLAMA_31_ROPE | {"factor": 32.0},
    tie_word_embeddings=True,
)
SMOLLM2 = shapes(
    "llama", 576, 1536, 30, 9, 49152, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True
)
QWEN = {"num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True}
GEMMA2 = shapes("gemma2", 2304, 9216, 26, 8, 256000, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256)
PYTHIA = shapes("gpt_neox", 2560, 10240, 32, 32, 50304, rotary_pct=0.25, max_position_embeddings=2048)


def published(name: str) -> dict[str, Any]:
    """Returns config.json of a model in benchmarks/shapes."""
    shape: dict[str, Any] = json.loads((SHAPES / name / "config.json").read_text())
    return shape


# Parameters as the models' publishers count them (Pythia: 2,775,208,960 with both embeddings), of multimodal models
# those of the text part.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (SMOLLM2, 134_515_008),
    "Qwen/Qwen2.5-0.5B-Instruct": (shapes("qwen2", 896, 4864, 24, 14, 151936, **QWEN), 494_032_768),
    "Qwen/Qwen2.5-0.5B": (shapes("qwen2", 896, 4864, 24, 14, 151936, **QWEN), 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": (shapes("qwen2", 1536, 8960, 28, 12, 151936, **QWEN), 1_543_714_304),
    "meta-llama/Llama-3.2-1B-Instruct": (LLAMA_1B, 1_235_814_400),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA_8B, 8_030_261_248),
    "meta-llama/Llama-3.1-70B-Instruct": (LLAMA_70B, 70_553_706_496),
    "google/gemma-2-2b-it": (GEMMA2, 2_614_341_888),
    "EleutherAI/pythia-2.8b": (PYTHIA, 2_775_208_960),
    "allenai/Olmo-3-7B-Instruct-SFT": (published("Olmo-3-7B-Instruct-SFT"), 7_298_011_136),
    "HuggingFaceTB/SmolLM3-3B-checkpoints": (published("SmolLM3-3B"), 3_075_098_624),
    "google/gemma-3-27b-it": (published("gemma-3-27b"), 27_009_346_304),
    "Qwen/Qwen3.5-4B": (published("Qwen3.5-4B"), 4_205_751_296),
    "openai/gpt-oss-20b": (published("gpt-oss-20b"), 20_914_757_184),
    "runs/pythia-hh/sft/model": (PYTHIA, 2_775_208_960),
    # The recipes for a model of random weights, with the model of the hub that their headers name.
    "runs/tiny": (SMOLLM2, 134_515_008),
    "runs/word_bias/sft/model": (SMOLLM2, 134_515_008),
    "runs/tiny_chat": (SMOLLM2, 134_515_008),
    "runs/chat_style/sft/model": (SMOLLM2, 134_515_008),
}


LOOP = CONFIGS / "iterate.yaml"


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.yaml")} - {LOOP}), ids=lambda path: path.stem)
def test_a_shipped_config_runs_dry(
    path: Path, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(path.read_text())
    head = path.read_text().partition("model_name_or_path")[0]
    command = re.search(rf"(?:jdpo (sft|dpo) configs/{path.name}|python benchmarks/\S+)", head)
    assert command, "its header says how to run it"
    if config["model_name_or_path"] not in MODELS:
        assert config["model_name_or_path"].startswith("runs/"), "a model of an earlier run, whose shape is its own"
        shape, num_params = MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
    else:
        shape, num_params = MODELS[config["model_name_or_path"]]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in toy_model.iterdir():
        if file.suffix != ".safetensors" and file.name != "generation_config.json":
            shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(shape))
    rows = write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(40))
    words = [f"model_name_or_path={folder}", f"datasets={rows}", f"output_dir={tmp_path / 'run'}"]
    words += [f"cache_dir={tmp_path / 'cache'}", "global_batch_size=8", "num_train_epochs=50"]
    words += [f"eval_datasets={rows}"] if "eval_datasets" in config else []
    words += ["model_revision=null"] if "model_revision" in config else []
    words += ["eval_fraction=0.02"] if "eval_fraction" in config else []  # a smaller part of 40 rows is none
    assert main([command[1] or ("sft" if "sft" in path.name else "dpo"), str(path), *words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert f"{num_params:,} parameters" in printed
    assert f"note: no weights in {folder}" in printed
    assert "kept on each device: " in printed
    assert "jdpo plan CONFIG.yaml --on" in printed
    assert not (tmp_path / "run").exists()


def test_the_shipped_loop_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "jdpo iterate configs/iterate.yaml" in LOOP.read_text()
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(100)])
    words = [f"--prompts={prompts}", f"--output_dir={tmp_path / 'loop'}", "--prompts_per_round=30"]
    assert main(["iterate", str(LOOP), *words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["generate", "score", "pair", "dpo", "compare"] * 3
    assert not (tmp_path / "loop").exists()
    assert main(["iterate", str(LOOP), *words, "--dpo={betta: 0.1}", "--dry_run"]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().err


def test_what_is_kept_on_a_device_follows_mesh_and_adapters(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    rows = write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(20))

    def kept(*words: str) -> float:
        own = [f"model_name_or_path={folder}", f"datasets={rows}", f"output_dir={tmp_path / 'run'}"]
        assert main(["dpo", *own, f"cache_dir={tmp_path / 'cache'}", *words, "--dry_run"]) == 0
        found = re.search(r"kept on each device: ([0-9.]+) GiB", capsys.readouterr().out)
        assert found
        return float(found[1])

    whole = ["mesh.data=8", "mesh.fsdp=1", "global_batch_size=8", "reference=cached"]
    gib = MODELS["meta-llama/Llama-3.1-8B-Instruct"][1] / 2**30
    assert kept(*whole) == pytest.approx(16 * gib, rel=1e-3), "float32 weights, gradients and two moments"
    assert kept(*whole, "optimizer=adamw_bf16") == pytest.approx(8 * gib, rel=1e-3)
    split = ["mesh.data=1", "mesh.fsdp=8", "global_batch_size=8", "reference=cached"]
    assert kept(*split) == pytest.approx(16 * gib / 8, rel=1e-3)
    assert kept(*split[:3], "reference=live", "compute_dtype=bfloat16") == pytest.approx(18 * gib / 8, rel=1e-3)
    adapted = kept(*whole, "lora.r=16", "compute_dtype=bfloat16", "lora.base_dtype=bfloat16")
    assert 2 * gib < adapted < 2.2 * gib
