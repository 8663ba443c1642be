"""config.json of multimodal models with the keys that published ones have, and with the sizes of their text parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jdpo.models.families import read_model_config

GEMMA3 = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "eos_token_id": [1, 106],
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 896, "vision_use_head": False},
}
MISTRAL_SMALL = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral", "head_dim": 64, "image_size": 1540, "rope_theta": 10000.0},
}
OF_QWEN25_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_VL = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "in_chans": 3,
        "spatial_patch_size": 14,
        "out_hidden_size": 2048,
    },
}
QWEN3_VL = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "vision_config": {"model_type": "qwen3_vl", "deepstack_visual_indexes": [5, 11, 17], "depth": 24},
}
# Flat as published; nested, and with the settings of the text part at both levels, as transformers 4 saved it.
QWEN25_FLAT = {**QWEN25_VL, **OF_QWEN25_TEXT}
QWEN25_NESTED = {**QWEN25_VL, "text_config": {"model_type": "qwen2_5_vl_text", **OF_QWEN25_TEXT}}
QWEN25_BOTH = {**QWEN25_NESTED, **OF_QWEN25_TEXT}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "sizes", "tied"),
    [
        pytest.param(GEMMA3, (34, 2560, 8, 4, 256, 262208), True, id="gemma3"),
        pytest.param(MISTRAL_SMALL, (40, 5120, 32, 8, 128, 131072), False, id="mistral small"),
        pytest.param(QWEN25_FLAT, (36, 2048, 16, 2, 128, 151936), True, id="qwen2.5-vl"),
        pytest.param(QWEN25_BOTH, (36, 2048, 16, 2, 128, 151936), True, id="qwen2.5-vl, both"),
        pytest.param(QWEN3_VL, (36, 2560, 32, 8, 128, 151936), True, id="qwen3-vl"),
    ],
)
def test_published_keys_are_read(tmp_path: Path, settings: dict[str, Any], sizes: tuple[int, ...], tied: bool) -> None:
    config = read_model_config(write(tmp_path, settings))
    found = (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim)
    assert (*found, config.vocab_size) == sizes
    assert config.tie_embeddings == tied
    assert config.family == settings["model_type"]


def test_where_the_settings_of_the_text_part_are_makes_no_difference(tmp_path: Path) -> None:
    flat = read_model_config(write(tmp_path, QWEN25_FLAT))
    assert read_model_config(write(tmp_path, QWEN25_NESTED)) == flat
    assert read_model_config(write(tmp_path, QWEN25_BOTH)) == flat
    assert [(rope.kind, rope.theta) for rope in flat.ropes] == [("default", 1e6)]
    with pytest.raises(ValueError, match="hidden_size: 1024 is not supported"):
        read_model_config(write(tmp_path, {**QWEN25_BOTH, "hidden_size": 1024}))
