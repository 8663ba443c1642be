"""Random small models made by transformers' own torch classes, two or more of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 50.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "rope_theta": 50.0,
}
SCALED_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False, "beta_slow": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [2.0, 3.0, 9.0],
    "rope_theta": 50.0,
    "partial_rotary_factor": 0.75,
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
SCALED_QUERIES = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 3,
    "beta_fast": 4.0,
    "rope_theta": 50.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.7,
}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.5,
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 10}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}

DELTA = {
    "head_dim": 8,
    "num_hidden_layers": 2,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": PARTIAL,
}
NARROW_DELTA = {
    **DELTA,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "rope_parameters": {**YARN, "partial_rotary_factor": 0.25},
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("Llama", {"rope_parameters": LINEAR, "attention_bias": True, "num_key_value_heads": 1}),
    ("Llama", {"rope_parameters": YARN, "mlp_bias": True, "hidden_act": "gelu"}),
    ("Llama", {"rope_parameters": SCALED_YARN, "hidden_act": "relu", "head_dim": 8}),
    ("Mistral", {"sliding_window": 4}),
    ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("Qwen3", {}),
    ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True, **MIXED}),
    ("Gemma", {}),
    ("Gemma", {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "gelu"}),
    ("Gemma2", {"sliding_window": 3, "num_hidden_layers": 3, **CAPS}),
    ("Gemma2", {"sliding_window": 5, "num_hidden_layers": 2, "attn_logit_softcapping": None, "num_key_value_heads": 1}),
    ("Gemma3Text", {"sliding_window": 3, "num_hidden_layers": 4, "sliding_window_pattern": 2}),
    ("Gemma3Text", {"rope_parameters": TWO_ROPES, "final_logit_softcapping": 4.0, **MIXED}),
    ("Phi3", {"sliding_window": 4, "rope_parameters": PARTIAL, "head_dim": 8}),
    ("Phi3", {"rope_parameters": LONGROPE, "head_dim": 8, "original_max_position_embeddings": 32}),
    ("Olmo2", {}),
    ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    (
        "SmolLM3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 3,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    ("Granite", MULTIPLIERS),
    ("Granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("GPT2", {}),
    ("GPT2", {"n_inner": 20, "scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("GPTNeoX", {"rotary_pct": 0.5}),
    ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False}),
    ("Cohere2", {"sliding_window": 3, "num_hidden_layers": 3, "sliding_window_pattern": 2, "logit_scale": 1.5}),
    ("Cohere2", {"sliding_window": 4, "num_hidden_layers": 5, "attention_bias": True, "logit_scale": 0.7}),
    ("Apertus", {"rope_parameters": LLAMA3}),
    ("Apertus", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("Apertus", {"hidden_act": "relu"}),
    ("Ernie4_5", {}),
    ("Ernie4_5", {"use_bias": True, "rope_parameters": YARN, "tie_word_embeddings": False, "head_dim": 8}),
    ("Gemma3", {"sliding_window": 3, "num_hidden_layers": 4, "sliding_window_pattern": 2}),
    ("Gemma3", {"rope_parameters": TWO_ROPES, **MIXED, "tie_word_embeddings": False}),
    ("Mistral3", {"sliding_window": None, "tie_word_embeddings": False}),
    ("Mistral3", {"sliding_window": 4, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("Qwen2_5_VL", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("Qwen2_5_VL", {"rope_parameters": YARN, "tie_word_embeddings": True, **MIXED}),
    ("Qwen3VL", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_interleaved": True}}),
    ("Qwen3VL", {"rope_parameters": YARN, "tie_word_embeddings": True, "attention_bias": True}),
    # As Phi-4-mini.
    (
        "Phi3",
        {
            "rope_parameters": LONGROPE,
            "head_dim": 8,
            "original_max_position_embeddings": 32,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
    ("Olmo3", {"sliding_window": 3, "num_hidden_layers": 5}),
    ("Olmo3", {**MIXED, "rope_parameters": TWO_ROPES, "attention_bias": True, "tie_word_embeddings": True}),
    ("Ministral3", {"rope_parameters": SCALED_QUERIES}),
    (
        "Ministral3",
        {
            "rope_parameters": {**SCALED_QUERIES, "original_max_position_embeddings": 2},
            "sliding_window": 4,
            "tie_word_embeddings": True,
            "num_hidden_layers": 2,
        },
    ),
    ("SeedOss", {}),
    (
        "SeedOss",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    ("Starcoder2", {"tie_word_embeddings": True}),
    ("Starcoder2", {"use_bias": False, "sliding_window": 3, "tie_word_embeddings": False}),
    ("Qwen3_5Text", {**DELTA, "attention_bias": True}),
    ("Qwen3_5Text", {**NARROW_DELTA, "tie_word_embeddings": True}),
    ("Qwen3_5", {**DELTA, "tie_word_embeddings": True}),
    ("Qwen3_5", NARROW_DELTA),
    # As Ministral 3 is published.
    ("Mistral3", {"model_type": "ministral3", "rope_parameters": SCALED_QUERIES, "tie_word_embeddings": True}),
]
CASE_NAMES = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]

_OLD_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def random_shape(rng: np.random.Generator) -> dict[str, Any]:
    """Draws odd head counts, grouped and plain attention, and sizes without a common factor."""
    num_kv_heads, head_dim = int(rng.integers(1, 4)), 2 * int(rng.integers(2, 6))
    num_heads = num_kv_heads * int(rng.integers(1, 4))
    return {
        "vocab_size": int(rng.integers(30, 90)),
        "hidden_size": num_heads * head_dim,
        "head_dim": head_dim,
        "intermediate_size": int(rng.integers(10, 50)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def renamed(prefix: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns sizes under the names of a family's config, without those that it lacks."""
    if prefix in ("GPT2", "GPTNeoX"):
        shape = {key: value for key, value in shape.items() if key not in ("head_dim", "num_key_value_heads")}
    if prefix == "GPT2":
        shape = {_OLD_KEYS.get(key, key): value for key, value in shape.items() if key != "intermediate_size"}
    return shape


_SIGHT = {"hidden_size": 8, "intermediate_size": 12, "patch_size": 4, "initializer_range": 0.3}
_LIKE_SIGLIP = {**_SIGHT, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
_LIKE_QWEN = {**_SIGHT, "depth": 2, "num_heads": 2}
SIGHT: dict[str, dict[str, Any]] = {
    "Gemma3": {**_LIKE_SIGLIP, "vision_use_head": False},
    "Mistral3": {**_LIKE_SIGLIP, "head_dim": 4},
    "Qwen2_5_VL": {**_LIKE_QWEN, "fullatt_block_indexes": [1], "window_size": 16},
    "Qwen3_5": {**_LIKE_QWEN, "num_position_embeddings": 16},
    "Qwen3_5Moe": {**_LIKE_QWEN, "num_position_embeddings": 16},
    "Qwen3VL": {**_LIKE_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
"""vision_config of multimodal models."""


def tower_settings(prefix: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a multimodal model whose text part has a shape."""
    text, vision = dict(shape), dict(SIGHT[prefix])
    image, video, start, end = range(shape["vocab_size"] - 4, shape["vocab_size"])
    own: dict[str, Any] = {"tie_word_embeddings": text.pop("tie_word_embeddings", prefix == "Gemma3")}
    if prefix.startswith("Qwen"):
        pairs = text["head_dim"] // 2
        # The three parts of the rope, of different sizes.
        text["rope_parameters"] = {
            **text["rope_parameters"],
            "mrope_section": [pairs - pairs // 3 * 2, *[pairs // 3] * 2],
        }
        vision["out_hidden_size"] = text["hidden_size"]
        own |= {"image_token_id": image, "video_token_id": video}
        own |= {"vision_start_token_id": start, "vision_end_token_id": end}
    else:
        own |= {"image_token_index": image}
    if prefix == "Gemma3":
        own |= {
            "initializer_range": 0.3,
            "mm_tokens_per_image": 4,
            "boi_token_index": start,
            "eoi_token_index": end,
        }
    if prefix == "Mistral3":
        text.setdefault("model_type", "mistral")
    if prefix == "Qwen2_5_VL":
        del text["head_dim"]  # which this family lacks
    return {"text_config": text, "vision_config": vision, **own}


def torch_model(prefix: str, settings: dict[str, Any], seed: int) -> Any:
    """Makes a float32 torch model whose norms and biases differ from 1 and 0."""
    import torch
    import transformers

    torch.manual_seed(seed)
    shape = {**random_shape(np.random.default_rng(seed)), **settings}
    if "head_dim" in settings:
        shape["hidden_size"] = shape["head_dim"] * shape["num_attention_heads"]
    own = tower_settings(prefix, shape) if prefix in SIGHT else renamed(prefix, shape)
    config = getattr(transformers, f"{prefix}Config")(**own)
    config._attn_implementation = "eager"  # the implementation that caps scores
    own_class = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix.removesuffix('Text')}ForCausalLM"
    own_class = f"{prefix}ForConditionalGeneration" if prefix in SIGHT else own_class
    model = getattr(transformers, own_class)(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias") or "alpha_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("projection_weight"):  # Gemma 3's map of images, which starts at zero
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("A_log"):
            parameter.data -= 3  # states that last for several tokens
    return model


def save(model: Any, folder: Path) -> None:
    """Saves a model as transformers does, in several files."""
    model.save_pretrained(folder, max_shard_size="20KB")
