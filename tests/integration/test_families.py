"""Whole runs of every family over a mesh, full and LoRA; each export has the tensors of its source."""

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

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
OLD_SIZES = {"n_embd": 48, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
OWN: dict[str, dict[str, Any]] = {
    "apertus": {"architectures": ["ApertusForCausalLM"]},
    "cohere2": {"architectures": ["Cohere2ForCausalLM"], "sliding_window": 16, "logit_scale": 1.0, "pad_token_id": 0},
    "ernie4_5": {"architectures": ["Ernie4_5ForCausalLM"], "pad_token_id": 0},
    "gemma": {"architectures": ["GemmaForCausalLM"]},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 16, "sliding_window_pattern": 2},
    "gpt2": {"architectures": ["GPT2LMHeadModel"]},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": 4, "rotary_pct": 0.5},
    "granite": {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.4, "logits_scaling": 2.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "ministral3": {"architectures": ["Ministral3ForCausalLM"]},
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], "sliding_window": 16},
    "seed_oss": {"architectures": ["SeedOssForCausalLM"]},
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 2},
}
LORA = {"lora.r": 4, "lora.alpha": 8, "lora.merge": "true", "learning_rate": 1e-2}
RUNS = [("gpt2", "dpo", {}), ("phi3", "dpo", LORA)]
"""In the default suite."""
MORE = [(family, *run) for family in OWN for run in (("dpo", {}), ("sft", {}), ("dpo", LORA))]


def write_model(family: str, toy_model: Path, folder: Path) -> Path:
    """Writes the toy's tokenizer with random weights of another family."""
    shutil.copytree(toy_model, folder)
    toy = json.loads((toy_model / "config.json").read_text())
    kept = {key: toy[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in toy}
    sizes = OLD_SIZES if family == "gpt2" else SIZES
    config = {"model_type": family, "pad_token_id": None, **sizes, **kept, **OWN[family]}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(read_model_config(folder)).items()}
    tensors = {name: rng.normal(len(shape) == 1, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "command", "settings"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.full) for run in MORE if run not in RUNS)],
    ids=lambda value: value if isinstance(value, str) else "lora" if value else "full",
)
def test_a_run_trains_and_exports_its_family(
    run_words: Callable[..., list[str]],
    toy_model: Path,
    tmp_path: Path,
    family: str,
    command: str,
    settings: dict[str, Any],
) -> None:
    source = write_model(family, toy_model, tmp_path / "source")
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    words = run_words(model_name_or_path=source, max_steps=2, **{**mesh, **settings})
    assert main([command, *words]) == 0
    out = tmp_path / "run" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {name: values.shape for name, values in before.items()} == {name: x.shape for name, x in after.items()}
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert any(
        name.endswith("down_proj.weight") or "c_proj.weight" in name or "4h_to_h.weight" in name for name in moved
    )
    assert read_model_config(out) == read_model_config(source)
