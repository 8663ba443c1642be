"""Rewards equal those of transformers' own classifiers, for every family that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.config import MeshConfig
from jdpo.scoring.reward import open_reward_model, rewards_of
from jdpo.sharding.mesh import make_mesh
from tests.models.torch_cases import CASE_NAMES, CASES, random_shape, renamed
from tests.scoring.test_reward import made

pytestmark = pytest.mark.torch

# transformers has no classifier of these.
WITHOUT = ("Apertus", "Cohere2", "Ernie4_5", "Granite")
WITH_CLASSIFIER = [(seed, case) for seed, case in enumerate(CASES) if case[0] not in WITHOUT]


def save_classifier(prefix: str, settings: dict[str, Any], seed: int, toy: Path, folder: Path) -> Any:
    """Makes a random classifier with the toy's tokenizer and saves it as transformers does."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
    shape = {**random_shape(np.random.default_rng(seed)), **settings, "max_position_embeddings": 512}
    if "head_dim" in settings:
        shape["hidden_size"] = shape["head_dim"] * shape["num_attention_heads"]
    if "original_max_position_embeddings" in settings:
        shape["original_max_position_embeddings"] = 512  # no model of jdpo is longer
    shape |= {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{prefix}Config")(**renamed(prefix, shape))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize(("seed", "case"), WITH_CLASSIFIER, ids=[CASE_NAMES[seed] for seed, _ in WITH_CLASSIFIER])
def test_rewards_equal_those_of_transformers(
    seed: int, case: tuple[str, dict[str, Any]], toy_model: Path, tmp_path: Path
) -> None:
    import torch

    classifier, tokenizer = save_classifier(*case, seed, toy_model, tmp_path)
    rows = made(8, seed)
    texts = [
        asked.prompt + given.message["content"]
        if isinstance(asked.prompt, str)
        else tokenizer.apply_chat_template([*asked.prompt, given.message], tokenize=False)
        for asked, given in rows
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, padding_side="right")
    with torch.no_grad():
        expected = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].numpy()
    model = open_reward_model(str(tmp_path), mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(rewards_of(model, rows), expected, atol=1e-4, rtol=1e-4)
