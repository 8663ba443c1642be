"""Tiny Hugging Face folders, written without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 4, "head_dim": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10},
}


def config_json(family: str, **overrides: Any) -> dict[str, Any]:
    return {"model_type": family, **BASE, **FAMILY_SETTINGS[family], **overrides}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the tensor names and shapes of transformers' classes for these families, written by hand."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    k = config.get("head_dim") or d // config["num_attention_heads"]
    q_rows, kv_rows = k * config["num_attention_heads"], k * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        shapes |= {layer + f"{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {layer + f"mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (d, f)
        shapes |= {layer + f"self_attn.{name}_proj.weight": (kv_rows, d) for name in ("k", "v")}
        shapes[layer + "self_attn.q_proj.weight"] = (q_rows, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, q_rows)
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            shapes |= {layer + f"self_attn.{name}_proj.bias": (kv_rows,) for name in ("k", "v")}
            shapes[layer + "self_attn.q_proj.bias"] = (q_rows,)
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (d,)
        if config["model_type"] == "qwen3":
            shapes |= {layer + f"self_attn.{name}_norm.weight": (k,) for name in ("q", "k")}
    return shapes


class Folder:
    """A model folder and the tensors written into it."""

    def __init__(self, path: Path, config: dict[str, Any], dtype: Any, num_shards: int) -> None:
        self.path, self.config = path, config
        rng = np.random.default_rng(0)
        self.tensors = {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in tensor_shapes(config).items()}
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        self.write(num_shards)

    def write(self, num_shards: int = 1) -> None:
        if num_shards == 1:
            save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
            return
        names = list(self.tensors)
        weight_map = {}
        for shard in range(num_shards):
            file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
            save_file({name: self.tensors[name] for name in names[shard::num_shards]}, self.path / file_name)
            weight_map |= dict.fromkeys(names[shard::num_shards], file_name)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Folder]:
    """Returns a function (family, dtype=float32, num_shards=1, **config.json settings) -> Folder of random weights."""

    def make(family: str, dtype: Any = np.float32, num_shards: int = 1, **settings: Any) -> Folder:
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        return Folder(path, config_json(family, **settings), dtype, num_shards)

    return make
