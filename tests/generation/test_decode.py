from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.generation.decode import generate, sample
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.models.weights.loading import load_params

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"
PROMPTS = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7, 9, 3, 2, 38, 4, 6, 2, 6, 4]]
NEW_TOKENS = 8
LOGITS = np.random.default_rng(0).normal(0, 2, (5, 20)).astype(np.float32)


@pytest.fixture(scope="module", params=["mistral", "mixtral", "qwen3"])
def loaded(request: pytest.FixtureRequest) -> tuple[Transformer, Any]:
    model = Transformer(read_model_config(GOLDEN / request.param))
    return model, load_params(GOLDEN / request.param, model)


def greedy_by_full_forward(model: Transformer, params: Any) -> list[list[int]]:
    """Decodes by the argmax of the whole sequence's logits, without a cache; right-padded to one shape."""
    forward = jax.jit(make_apply_fn(model))
    sequences = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW_TOKENS):
        tokens = np.zeros((len(PROMPTS), 24), np.int32)
        lengths = np.array([len(sequence) for sequence in sequences])
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        logits = np.asarray(forward(params, tokens, np.arange(24) < lengths[:, None]))
        for row, sequence in enumerate(sequences):
            sequence.append(int(logits[row, lengths[row] - 1].argmax()))
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, PROMPTS, strict=True)]


def test_greedy_equals_the_argmax_of_the_full_forward(loaded: tuple[Transformer, Any]) -> None:
    model, params = loaded
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "key": jax.random.key(0), "temperature": 0.0}
    expected = greedy_by_full_forward(model, params)
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert generate(params, model, PROMPTS, end_token_ids=[], **options) == expected
    # The first token that only some rows ever produce: those stop after it, the others continue.
    end = next(token for token in expected[0] if not all(token in tokens for tokens in expected))
    stopped = generate(params, model, PROMPTS, end_token_ids=[end, 39], **options)
    for tokens, whole in zip(stopped, expected, strict=True):
        ends = [index for index, token in enumerate(whole) if token in (end, 39)]
        assert tokens == (whole[: ends[0] + 1] if ends else whole)
    assert stopped != expected


def test_sampling_repeats_with_the_key(loaded: tuple[Transformer, Any]) -> None:
    model, params = loaded

    def draw(seed: int) -> list[list[int]]:
        key = jax.random.key(seed)
        return generate(params, model, PROMPTS, max_new_tokens=NEW_TOKENS, end_token_ids=[], key=key)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_draws_follow_the_distribution() -> None:
    row = jnp.asarray(np.repeat(LOGITS[:1], 4000, axis=0))
    counts = np.bincount(sample(row, jax.random.key(0), 0.7), minlength=20)
    weights = np.exp(LOGITS[0] / 0.7)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.03)


def test_a_draw_does_not_depend_on_other_rows() -> None:
    key = jax.random.key(3)
    alone, together = (sample(jnp.asarray(logits), key, 1.0).tolist() for logits in (LOGITS[:2], LOGITS))
    assert alone == together[:2]
    assert len(set(sample(jnp.zeros((50, 20)), key, 1.0).tolist())) > 5


def test_bad_prompts_are_named() -> None:
    model = Transformer(read_model_config(GOLDEN / "qwen3"))
    options: dict[str, Any] = {"end_token_ids": [], "key": jax.random.key(0)}
    assert generate({}, model, [], max_new_tokens=1, **options) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate({}, model, [[1], []], max_new_tokens=1, **options)
    with pytest.raises(ValueError, match=r"prompt 0 has 60 tokens.* 64 positions"):
        generate({}, model, [[1] * 60], max_new_tokens=5, **options)
    with pytest.raises(ValueError, match="max_new_tokens: expected 1 or more, found 0"):
        generate({}, model, [[1]], max_new_tokens=0, **options)
    for temperature in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected 0"):
            generate({}, model, [[1]], max_new_tokens=1, temperature=temperature, **options)
