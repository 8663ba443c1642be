"""config.json of families with experts: settings that are read, and settings that are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jdpo.models.families import read_model_config
from jdpo.models.model_config import MoEConfig
from jdpo.models.weights.hf_names import hf_tensors
from jdpo.models.weights.loading import check_tensors
from jdpo.models.weights.safetensors_folder import tensor_entries

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 40,
}


def write(folder: Path, model_type: str, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **SHAPE, **settings}))
    return folder


def test_mixtral_has_experts_everywhere_and_normalises(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "mixtral", num_local_experts=4, router_aux_loss_coef=0.02))
    assert config.moe == MoEConfig(num_experts=4, experts_per_token=2, d_ff=24, normalize=True, aux_loss_coef=0.0)
    assert config.moe is not None
    assert config.moe.aux_loss_coef == 0.02  # this does not change the model, so a reference may have another value
    assert [kind.mlp for kind in config.layers] == ["experts"] * 6
    assert hf_tensors(config)["model.layers.5.block_sparse_moe.experts.3.w2.weight"][0].at == (5, 3)


def test_qwen3_moe_puts_dense_layers_where_its_settings_say(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10}
    config = read_model_config(
        write(tmp_path, "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True, **sizes)
    )
    assert config.moe == MoEConfig(num_experts=8, experts_per_token=3, d_ff=10, normalize=True, aux_loss_coef=0.0)
    assert [kind.mlp for kind in config.layers] == ["dense", "experts", "dense", "dense", "dense", "experts"]
    shapes = {name: pieces[0].hf_shape for name, pieces in hf_tensors(config).items()}
    assert shapes["model.layers.1.mlp.experts.7.gate_proj.weight"] == (10, 16)
    assert shapes["model.layers.1.mlp.gate.weight"] == (8, 16)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (24, 16)
    plain = read_model_config(write(tmp_path, "qwen3_moe", **sizes))
    assert plain.moe is not None
    assert not plain.moe.normalize


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_refused_with_what_to_do(tmp_path: Path, family: str) -> None:
    config = read_model_config(write(tmp_path, family, num_experts=4, num_local_experts=4, num_experts_per_tok=2))
    fused = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 48, 16), np.float32)}
    save_file(fused, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"save it with one tensor per expert"):
        check_tensors(tmp_path, tensor_entries(tmp_path), config)


def test_a_model_all_of_whose_layers_are_dense_has_no_router(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "qwen3_moe", mlp_only_layers=list(range(6)), head_dim=8))
    dense = read_model_config(write(tmp_path, "qwen3", head_dim=8))
    assert config.moe is None
    assert dataclasses.replace(config, family="qwen3", max_positions=dense.max_positions) == dense


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported, expected 0"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected 1 to 8, the number of experts, found 9"),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts: 1 is not supported"),
        ("mixtral", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is not supported"),
        ("mixtral", {"layer_types": ["full_attention"] * 6}, "layer_types: not a setting of the family mixtral"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size: 8 is not supported"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not supported"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor: 2.5 is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected 1 or more, found 0"),
    ],
)
def test_other_kinds_of_experts_are_refused_by_name(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="config") as error:
        read_model_config(write(tmp_path, family, **settings))
    assert message in str(error.value)
