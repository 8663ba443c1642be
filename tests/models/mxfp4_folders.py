"""Small gpt-oss folders whose experts are in MXFP4, and the same in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jdpo.models.families import read_model_config
from jdpo.models.weights.hf_names import hf_tensors

SIZES = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "sliding_window": 16,
    "max_position_embeddings": 128,
    "initial_context_length": 64,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "router_aux_loss_coef": 0.9,
    "torch_dtype": "bfloat16",
}
"""config.json as gpt-oss is published, with small sizes."""

QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def read_plainly(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers of blocks [.., g, 16] with scales [.., g], float64 [.., 32 g], by their bits."""
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32).astype(int)
    sign, exponent, mantissa = 1.0 - 2 * (nibbles >> 3), nibbles >> 1 & 3, nibbles & 1
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    numbers = sign * magnitude * 2.0 ** (scales.astype(int)[..., None] - 127)
    return numbers.reshape(*blocks.shape[:-2], -1)


def write_folders(quantized: Path, plain: Path, **settings: Any) -> None:
    """Writes random weights to two folders: experts in MXFP4 in the first, their bfloat16 numbers in the second."""
    rng = np.random.default_rng(0)
    for folder, own in ((quantized, {"quantization_config": QUANTIZATION}), (plain, {})):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**SIZES, "vocab_size": 40, **settings, **own}))
    found: dict[str, Any] = {}
    for name, pieces in hf_tensors(read_model_config(plain)).items():
        shape = pieces[0].hf_shape
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found |= _experts(rng, name, shape)
        else:
            found[name] = rng.normal(float("norm" in name), 0.2, shape).astype(ml_dtypes.bfloat16)
    numbers = {
        name.removesuffix("_blocks"): np.ascontiguousarray(
            read_plainly(values, found[name.replace("_blocks", "_scales")]).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
        )
        for name, values in found.items()
        if name.endswith("_blocks")
    }
    others = {name: values for name, values in found.items() if values.dtype != np.uint8}
    _save(found, quantized)
    _save(others | numbers, plain)


def _experts(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns blocks and scales for a tensor [e, inputs, outputs]; the inputs are last and grouped by 32."""
    num_experts, inputs, outputs = shape
    scales = rng.integers(121, 126, (num_experts, outputs, inputs // 32))
    return {
        f"{name}_blocks": rng.integers(0, 256, (*scales.shape, 16)).astype(np.uint8),
        f"{name}_scales": scales.astype(np.uint8),
    }


def _save(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
