"""Prompts computed once and answers decoded with the cache have the logits of the whole sequence, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.generation.row_programs import empty_rows
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn, unroll
from jdpo.models.weights.loading import load_params
from tests.golden_models import GOLDEN_MODELS, golden_models

SHORT = ("cohere2", "gemma2", "gpt2", "mixtral", "qwen3_5_text")
"""In the default suite: interleaved rotation and layers without rope, soft caps, windows and post-norms, learned
positions, experts, a delta rule."""
LENGTHS = np.array([7, 2, 4])
NUM_ROWS, NUM_TOKENS = 2, 6


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", golden_models(short=SHORT))
def test_decoding_equals_the_forward_pass(name: str) -> None:
    config = read_model_config(GOLDEN_MODELS / name)
    model = Transformer(config, compute_dtype=jnp.float64, param_dtype=jnp.float64)
    params = load_params(GOLDEN_MODELS / name, model, dtype=jnp.float64)
    rng, shape = np.random.default_rng(0), (len(LENGTHS), NUM_ROWS)
    prompts = rng.integers(0, config.vocab_size, (len(LENGTHS), 8))
    answers = jnp.asarray(rng.integers(0, config.vocab_size, (*shape, NUM_TOKENS)))
    # Rows begin one after the other, so that they are at different slots, and left-over slots hold other numbers.
    delays = np.array([[0, 3], [1, 0], [2, 2]])
    slots = {"prompt_slots": 11, "tail_slots": NUM_TOKENS}
    rows = empty_rows(model=model, num_places=len(LENGTHS), num_rows=NUM_ROWS, **slots)
    left_over = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape)), rows.caches)

    @jax.jit
    def run(params: Any) -> Any:
        first, keys = model.apply({"params": params}, prompts, LENGTHS, method="prefill")
        kept = unroll(config, keys)["rest"]
        places = jnp.arange(len(LENGTHS))
        caches = tuple(cache.insert(places, kept[f"layer_{i}"]) for i, cache in enumerate(left_over))
        unrolled = unroll(config, params)

        def step(caches: Any, number: Any) -> Any:
            index = number - delays
            is_real, slot = (index >= 0) & (index < NUM_TOKENS), index.clip(0, NUM_TOKENS - 1)
            tokens = jnp.take_along_axis(answers, slot[..., None], axis=2)[..., 0]
            arguments = (tokens, is_real, LENGTHS, slot, caches)
            logits, caches = model.clone(unrolled=True).apply({"params": unrolled}, *arguments, method="decode")
            return caches, logits

        return first, jax.lax.scan(step, caches, jnp.arange(NUM_TOKENS + delays.max()))[1]

    first, decoded = map(np.asarray, run(params))
    whole = np.zeros((*shape, 16), int)
    for place, length in enumerate(LENGTHS):
        whole[place, :, :length], whole[place, :, length : length + NUM_TOKENS] = (
            prompts[place, :length],
            answers[place],
        )
    tokens = whole.reshape(-1, 16)
    mask = np.arange(16) < LENGTHS.repeat(NUM_ROWS)[:, None] + NUM_TOKENS
    expected = np.asarray(jax.jit(make_apply_fn(model))(params, tokens, mask)).reshape(*shape, 16, -1)
    for place, length in enumerate(LENGTHS):
        np.testing.assert_allclose(first[place], expected[place, 0, length - 1], atol=1e-9)
        for row, delay in enumerate(delays[place]):
            np.testing.assert_allclose(
                decoded[delay : delay + NUM_TOKENS, place, row],
                expected[place, row, length : length + NUM_TOKENS],
                atol=1e-9,
            )
