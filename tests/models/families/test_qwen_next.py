"""Qwen3-Next and Qwen3.5: config.json as published, what is refused, and experts in one tensor or one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.models.families import read_model_config
from jdpo.models.model_config import DeltaConfig, LayerKind, MoEConfig, RopeConfig
from jdpo.models.weights.hf_names import hf_tensors
from jdpo.models.weights.loading import load_params
from tests.golden_models import GOLDEN_MODELS

# As in config.json of Qwen3.5-35B-A3B, with fewer layers.
PUBLISHED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_gate_type": "swish",
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "use_cache": True,
    "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}


def write(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **settings}))
    return folder


def test_the_published_config_of_qwen_3_5_35b(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path))
    delta, attention = (
        LayerKind(rope=None, mixer="delta", mlp="experts"),
        LayerKind(rope=RopeConfig(theta=1e7, fraction=0.25), mlp="experts"),
    )
    assert config.layers == (delta, delta, delta, attention)
    assert config.delta == DeltaConfig(
        num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_width=4
    )
    assert config.moe == MoEConfig(
        num_experts=256, experts_per_token=8, d_ff=512, normalize=True, shared_d_ff=512, aux_loss_coef=0.001
    )
    assert (config.norm, config.qk_norm, config.attention_gate, config.qkv_bias) == ("rms_offset", "head", True, False)
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(config).items()}
    assert shapes["model.layers.3.self_attn.q_proj.weight"] == (2 * 16 * 256, 2048)
    assert shapes["model.layers.0.linear_attn.in_proj_qkv.weight"] == (2 * 16 * 128 + 32 * 128, 2048)
    assert shapes["model.layers.0.linear_attn.conv1d.weight"] == (2 * 16 * 128 + 32 * 128, 1, 4)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (256, 2 * 512, 2048)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate: False is not supported, expected true"),
        ({"layer_types": ["sliding_attention"] * 4}, "'sliding_attention' is not supported; supported are full_att"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads 24 is not a multiple of linear_num_key_heads 16"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: expected 1 or more, found 0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported with linear_attention"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: expected 1 or more, found 0"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type: 'sigmoid' is not supported"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers: [1] is not supported"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="config") as error:
        read_model_config(write(tmp_path, **settings))
    assert message in str(error.value)


def in_one_tensor(tensors: dict[str, np.ndarray], num_experts: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a folder with the experts of each layer in one, as Qwen3.5 is published."""
    layers = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    fused = {name: values for name, values in tensors.items() if ".experts." not in name}
    for layer in layers:
        gate, up, down = (
            np.stack([tensors[f"{layer}.experts.{index}.{part}_proj.weight"] for index in range(num_experts)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{layer}.experts.down_proj": down}
    return fused


@pytest.mark.parametrize("family", ["qwen3_next", pytest.param("qwen3_5_moe", marks=pytest.mark.full)])
def test_both_forms_of_experts_are_read(tmp_path: Path, family: str) -> None:
    config = read_model_config(GOLDEN_MODELS / family)
    tensors = in_one_tensor(load_file(GOLDEN_MODELS / family / "model.safetensors"), 4)
    save_file(tensors, tmp_path / "model.safetensors")
    expected, found = (load_params(folder, config) for folder in (GOLDEN_MODELS / family, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_text_folder_with_the_names_of_a_multimodal_model_is_read(tmp_path: Path) -> None:
    source = GOLDEN_MODELS / "qwen3_5_text"
    config = read_model_config(source)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    others = {"mtp.fc.weight": np.ones((16, 32), np.float32), "model.visual.merger.norm.bias": np.ones(8, np.float32)}
    save_file(renamed | others, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, config), load_params(source, config))
