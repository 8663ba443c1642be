"""Logits against transformers' own torch classes at random small shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.models.families import read_model_config
from jdpo.models.hf_weights import iter_hf_tensors, load_params
from jdpo.models.transformer import Transformer, make_apply_fn

pytestmark = pytest.mark.torch

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 50.0,
}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("Llama", {"rope_parameters": LINEAR, "attention_bias": True, "num_key_value_heads": 1}),
    ("Mistral", {"sliding_window": 4}),
    ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("Qwen3", {}),
    ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True, **MIXED}),
]


def random_shape(rng: np.random.Generator) -> dict[str, int]:
    """Odd head counts, grouped and plain attention, sizes that share no factor."""
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
        "pad_token_id": None,
    }


@pytest.mark.parametrize(
    ("seed", "case"), list(enumerate(CASES)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
)
def test_logits_and_tensors_equal_those_of_torch(tmp_path: Path, seed: int, case: tuple[str, dict[str, Any]]) -> None:
    import torch
    import transformers

    prefix, settings = case
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    hf_config = getattr(transformers, f"{prefix}Config")(**{**random_shape(rng), **settings})
    reference = getattr(transformers, f"{prefix}ForCausalLM")(hf_config).eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")

    model = Transformer(read_model_config(tmp_path))
    params = load_params(tmp_path, model)
    state = reference.state_dict()
    for name, values in iter_hf_tensors(params, model.config):
        np.testing.assert_array_equal(values, state.pop(name).numpy(), err_msg=name)
    assert set(state) == ({"lm_head.weight"} if model.config.tie_embeddings else set())

    tokens = rng.integers(0, hf_config.vocab_size, (4, 12))
    lengths, lefts = rng.integers(4, 13, 4), np.array([True, False, True, False])
    slots = np.where(lefts[:, None], np.arange(12)[::-1], np.arange(12))
    mask = slots < lengths[:, None]
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=torch.tensor(positions)
        ).logits.numpy()
    logits = np.asarray(jax.jit(make_apply_fn(model))(params, tokens, mask))
    assert np.abs(expected[mask]).max() > 1
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-4)
