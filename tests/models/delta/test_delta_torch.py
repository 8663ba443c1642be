"""Rows of several chunks against transformers' torch class, which has chunks of its own."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.models.weights.loading import load_params
from tests.models.torch_cases import DELTA, torch_model

pytestmark = pytest.mark.torch


def test_long_rows_equal_torch_with_padding_on_either_side(tmp_path: Path) -> None:
    import torch

    reference = torch_model("Qwen3_5Text", {**DELTA, "max_position_embeddings": 256}, seed=0)
    reference.save_pretrained(tmp_path)
    model = Transformer(read_model_config(tmp_path))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 150))
    mask = np.ones(tokens.shape, bool)
    mask[1, 133:], mask[2, :37] = False, False
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=positions
        ).logits.numpy()
    found = np.asarray(jax.jit(make_apply_fn(model))(load_params(tmp_path, model), tokens, mask))
    assert np.abs(expected[mask]).max() > 1
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)
