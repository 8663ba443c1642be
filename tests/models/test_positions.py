"""Models with a last position: learned positions, and longrope's factors for short sequences."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.generation.engine import Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.training.setup.model_sources import check_positions

GPT2 = Path(__file__).parents[1] / "golden" / "logits" / "gpt2"


def test_a_max_length_beyond_the_last_position_is_refused_by_name(tmp_path: Path) -> None:
    model_config = read_model_config(GPT2)
    check_positions(model_config, max_length=64, name=str(GPT2))
    with pytest.raises(ValueError, match=r"max_length 65: .*gpt2 has 64 positions"):
        check_positions(model_config, max_length=65, name=str(GPT2))
    factors = {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "pad_token_id": 0}
    phi3 = {"model_type": "phi3", **sizes, "original_max_position_embeddings": 32, "rope_scaling": factors}
    (tmp_path / "config.json").write_text(json.dumps(phi3))
    with pytest.raises(ValueError, match=r"has 32 positions \(longrope's factors"):
        check_positions(read_model_config(tmp_path), max_length=33, name="phi3")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8}))
    check_positions(read_model_config(tmp_path), max_length=64, name="llama")  # a plain rope has no last position


def test_generation_ends_where_the_model_does() -> None:
    model = Transformer(read_model_config(GPT2))
    params = load_params(GPT2, model)
    engine = Engine(model, params, end_token_ids=[], sampling=Sampling(temperature=0, max_new_tokens=9))
    with pytest.raises(ValueError, match="none of the model's 64 positions"):
        engine.run([[3] * 64])
    (found,) = engine.run([[3] * 60])
    assert (len(found.tokens), found.finish_reason) == (4, "length")
    tokens = np.array([[3] * 60 + found.tokens])
    logits = np.asarray(make_apply_fn(model)(params, tokens, np.ones_like(tokens, bool)))
    assert logits[0, 59:-1].argmax(-1).tolist() == found.tokens


def test_a_checkpoint_without_prefix_and_with_stored_masks_is_the_same_model(tmp_path: Path) -> None:
    """Covers checkpoints such as the hub's first GPT-2, which was saved without its head."""
    tensors = load_file(GPT2 / "model.safetensors")
    old = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    masks = {f"h.{index}.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)) for index in range(3)}
    save_file(old | masks, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GPT2 / "config.json").read_bytes())
    found, expected = (load_params(folder, read_model_config(folder)) for folder in (tmp_path, GPT2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
