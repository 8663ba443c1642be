"""Greedy answers are, token for token, those of transformers' generate with the same float32 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jdpo.generation.engine import Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import FAMILIES, read_model_config
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jdpo.models.lora.adapters import Lora, init_adapters, weights_of
from jdpo.models.lora.base_weights import Base
from jdpo.models.lora.peft_folder import peft_config, peft_tensors
from jdpo.models.lora.targets import choose_sites, find_sites
from jdpo.models.transformer import Transformer
from jdpo.models.weights.loading import load_params
from tests.models.experts.test_moe_torch import CASES as EXPERTS
from tests.models.experts.test_moe_torch import make_torch
from tests.models.lora.test_peft_torch import CASES as ADAPTED
from tests.models.lora.test_peft_torch import OF_EXPERTS, torch_model
from tests.models.torch_cases import CASES as DENSE
from tests.models.torch_cases import torch_model as dense_model

pytestmark = [
    pytest.mark.torch,
    # As in tests/models/lora/test_peft_torch.py.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

LENGTHS, NEW_TOKENS = (8, 1, 5), 24
"""A window of 3 to 5 tokens is in the prompt, over its end, and in the answer."""


def make_prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, length).tolist() for length in LENGTHS]


def of_transformers(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Generates one prompt at a time, so that transformers has no padding."""
    import torch
    from transformers import GenerationConfig

    # Without an end token, so that every answer has all its tokens; the model's own settings may name one.
    reference.generation_config = GenerationConfig(pad_token_id=0)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        found = reference.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def of_jdpo(model: Transformer, weights: Any, prompts: list[list[int]]) -> list[list[int]]:
    # Fewer slots than prompts, so that the last prompt begins where another one was.
    sampling = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
    engine = Engine(model, weights, end_token_ids=[], sampling=sampling, max_slots=2)
    return [drawn.tokens for drawn in engine.run(prompts)]


def check(reference: Any, model: Transformer, weights: Any) -> list[list[int]]:
    prompts = make_prompts(model.config.vocab_size)
    expected = of_transformers(reference, prompts)
    assert [len(answer) for answer in expected] == [NEW_TOKENS] * len(prompts)
    assert of_jdpo(model, weights, prompts) == expected
    return expected


def test_the_cases_are_of_every_family() -> None:
    words = {name.lower().replace("_", "") for name in FAMILIES}
    assert words == {name.lower().replace("_", "") for name, _ in [*DENSE, *EXPERTS]}


@pytest.mark.parametrize(
    ("seed", "case"), list(enumerate(DENSE)), ids=[f"{name}-{seed}" for seed, (name, _) in enumerate(DENSE)]
)
def test_dense_families(seed: int, case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    reference = dense_model(*case, seed)
    reference.save_pretrained(tmp_path)
    model = Transformer(read_model_config(tmp_path))
    check(reference, model, load_params(tmp_path, model))


@pytest.mark.parametrize(
    ("seed", "case"), list(enumerate(EXPERTS)), ids=[f"{name}-{seed}" for seed, (name, _) in enumerate(EXPERTS)]
)
def test_families_with_experts(seed: int, case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    reference = make_torch(seed, *case, vocab_size=61)
    reference.save_pretrained(tmp_path)
    model = Transformer(read_model_config(tmp_path))
    check(reference, model, load_params(tmp_path, model))


@pytest.mark.parametrize("name", [*ADAPTED, *OF_EXPERTS])
def test_adapters_next_to_their_base(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    settings, targets = (ADAPTED | OF_EXPERTS)[name]
    reference = torch_model(name, settings, tmp_path / "base")
    model = Transformer(read_model_config(tmp_path / "base"))
    base, sites = Base(load_params(tmp_path / "base", model), {}), find_sites(model)
    alone = check(reference, model, base.params)

    lora = Lora(r=2, alpha=3.0, use_rslora=True, sites=choose_sites(sites, targets))
    adapters = init_adapters(lora, jax.random.key(0), jnp.float32)
    adapters = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(peft_tensors(lora, jax.device_get(adapters)), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(peft_config(lora, sites, str(tmp_path / "base"), None)))
    adapted = PeftModel.from_pretrained(reference, str(folder)).eval()
    assert check(adapted, model, weights_of(lora, base, adapters)) != alone
