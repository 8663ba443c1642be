"""Writes tests/golden/logits: a tiny model folder per family, with the logits of transformers' torch model.

The tests load each folder and compare, so that parity is checked where torch is not installed.

    python scripts/make_golden_logits.py             # needs the parity extra; rewrites every folder, seeded
    python scripts/make_golden_logits.py olmo3 ..    # only these folders
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parents[1] / "tests" / "golden" / "logits"
BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.5,
}
DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
TWO_MIXERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 12,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [2.0, 3.0, 9.0],
    "rope_theta": 50.0,
    "partial_rotary_factor": 0.75,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 2}),
    "cohere2": ("Cohere2", {"sliding_window": 3, "sliding_window_pattern": 2, "logit_scale": 0.7, "pad_token_id": 0}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 6, "use_bias": True}),
    "gemma": ("Gemma", {"head_dim": 6, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 6,
            "sliding_window": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 10,
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {"head_dim": 6, "sliding_window": 3, "sliding_window_pattern": 2, "rope_parameters": TWO_ROPES},
    ),
    "gpt2": ("GPT2", {"hidden_size": 15, "num_attention_heads": 3}),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 24, "num_attention_heads": 3, "rotary_pct": 0.25}),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 6, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.7}
        | {"rope_parameters": {**YARN_ROPE, "truncate": False}},
    ),
    "granite": ("Granite", {**MULTIPLIERS, "mlp_bias": True}),
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 6,
            "rope_parameters": {**YARN_ROPE, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.8},
            "num_hidden_layers": 2,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "olmo2": ("Olmo2", {"rope_parameters": YARN_ROPE}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {**TWO_ROPES, "full_attention": YARN_ROPE},
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 4, "head_dim": 8, "hidden_size": 32, "partial_rotary_factor": 0.75}),
    # As Phi-4-mini: a part of each head is rotated, by longrope; grouped queries; a tied head.
    "phi4_mini": (
        "Phi3",
        {
            "head_dim": 8,
            "hidden_size": 32,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 48,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "mlp_only_layers": [1]},
    ),
    "qwen3_5_text": ("Qwen3_5Text", {**DELTA, **TWO_MIXERS, "tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**DELTA, **TWO_MIXERS, **SHARED_EXPERT}),
    "qwen3_next": (
        "Qwen3Next",
        {**DELTA, **SHARED_EXPERT, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "seed_oss": ("SeedOss", {"head_dim": 6, "attention_out_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "attention_bias": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
}
SIGHT = {"hidden_size": 8, "intermediate_size": 12, "patch_size": 4}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {"head_dim": 6, "sliding_window": 3, "sliding_window_pattern": 2, "rope_parameters": TWO_ROPES},
        {**SIGHT, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "vision_use_head": False},
        {"mm_tokens_per_image": 4, "image_token_index": 30, "boi_token_index": 31, "eoi_token_index": 32},
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 6, "sliding_window": None},
        {**SIGHT, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4, "image_size": 16},
        {"image_token_index": 30, "tie_word_embeddings": False},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 0]}},
        {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0], "window_size": 16},
        {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1]}},
        {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0]},
        {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}
        | {"tie_word_embeddings": True},
    ),
    "qwen3_5": (
        "Qwen3_5",
        {**DELTA, **TWO_MIXERS},
        {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16},
        {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}
        | {"tie_word_embeddings": True},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**DELTA, **TWO_MIXERS, **SHARED_EXPERT},
        {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16},
        {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33},
    ),
}
"""Multimodal models: name of the class, text_config, vision_config, other settings."""


def main() -> None:
    names = sys.argv[1:]
    # A folder that no case writes is removed, too.
    for name in names or sorted(path.name for path in OUT.iterdir()):
        shutil.rmtree(OUT / name, ignore_errors=True)
    for name in names or [*CASES, *TOWERS]:
        write_case(OUT / name, tower_config(name) if name in TOWERS else text_config(name))
        print(f"{OUT / name}")


def text_config(name: str) -> Any:
    """Returns transformers' config of a text model."""
    import transformers

    prefix, settings = CASES[name]
    config_class = getattr(transformers, f"{prefix}Config")
    own = {key: value for key, value in BASE.items() if hasattr(config_class(), key)}  # GPT-2 has no grouped heads
    return config_class(**{**own, **settings})


def tower_config(name: str) -> Any:
    """Returns transformers' config of a multimodal model."""
    import transformers

    prefix, text, vision, settings = TOWERS[name]
    config_class = getattr(transformers, f"{prefix}Config")
    return config_class(text_config={**BASE, "num_hidden_layers": 2, **text}, vision_config=vision, **settings)


def write_case(folder: Path, config: Any) -> None:
    """Writes a bfloat16 folder with norms and biases other than 1 and 0, padded tokens, and their float32 logits.

    For a model with experts, also writes the router's load balancing loss of these tokens.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    is_tower = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if is_tower else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias") or "alpha_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("A_log"):
            parameter.data -= 3  # states that last for several tokens
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    # Read back, since .to(bfloat16) has rounded the rotary frequencies too.
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    rng = np.random.default_rng(0)
    # Below the tokens that stand for images.
    tokens = rng.integers(0, 30 if is_tower else config.vocab_size, (3, 12))
    mask = np.ones(tokens.shape, bool)
    mask[1, 8:] = False  # padded right
    mask[2, :5] = False  # padded left
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    options = {}
    if hasattr(config.get_text_config(), "num_experts"):
        options = {"output_router_logits": True}
        model.set_experts_implementation("eager")  # the other kernels need sizes that are multiples of 16 bytes
    with torch.no_grad():
        found = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
            **options,
        )
    expected = {"logits": found.logits.numpy()} | ({"aux_loss": found.aux_loss.numpy()} if options else {})
    np.savez(folder / "expected.npz", tokens=tokens.astype(np.int32), mask=mask, **expected)


if __name__ == "__main__":
    main()
