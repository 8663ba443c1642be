"""Divergences against their closed form, and against plain sums over all logits in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses.divergence import ModelHead, token_divergences
from jdpo.losses.linear_chunks import HeadSettings


def categorical(probabilities: list[float], positions: int = 1) -> ModelHead:
    """A model of width 1 that always has these probabilities."""
    return ModelHead(jnp.ones((1, positions, 1)), jnp.log(jnp.array([probabilities])))


PLAIN = HeadSettings(None, None, False)


def random_head(width: int, seed: int, settings: HeadSettings = PLAIN) -> ModelHead:
    rng = np.random.default_rng(seed)
    return ModelHead(jnp.asarray(rng.normal(size=(3, 10, width))), jnp.asarray(rng.normal(size=(width, 37))), settings)


def plain(first: ModelHead, second: ModelHead) -> np.ndarray:
    """KL(first || second) [r, k] in float64 by numpy."""
    logps = []
    for hidden, head, settings in (first, second):
        logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
        logits *= 1 if settings.scale is None else settings.scale
        if settings.softcap is not None:
            logits = settings.softcap * np.tanh(logits / settings.softcap)
        logps.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return (np.exp(logps[0]) * (logps[0] - logps[1])).sum(-1)


def test_closed_form_of_two_coins() -> None:
    forward, backward = token_divergences(categorical([0.9, 0.1]), categorical([0.5, 0.5]))
    assert float(forward[0, 0]) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), rel=1e-5)
    assert float(backward[0, 0]) == pytest.approx(-0.5 * np.log(4 * 0.9 * 0.1), rel=1e-5)


def test_an_impossible_token_gives_infinity_one_way_alone() -> None:
    forward, backward = token_divergences(categorical([1.0, 0.0]), categorical([0.5, 0.5]))
    assert float(forward[0, 0]) == pytest.approx(np.log(2))
    assert float(backward[0, 0]) == np.inf


@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
def test_equals_sums_over_all_logits_in_float64(chunk_size: int | None) -> None:
    with jax.enable_x64(True):
        # Models of two widths, one of which scales and bounds its logits.
        first, second = random_head(8, 0), random_head(5, 1, HeadSettings(3.0, 0.7, False))
        forward, backward = token_divergences(first, second, chunk_size=chunk_size)
        assert forward.dtype == jnp.float64
        np.testing.assert_allclose(forward, plain(first, second), rtol=1e-12)
        np.testing.assert_allclose(backward, plain(second, first), rtol=1e-12)
        # Exactly zero, as every difference is.
        assert not np.any(token_divergences(first, first, chunk_size=chunk_size))


def test_positions_after_a_row_are_never_read() -> None:
    first, second = random_head(8, 0), random_head(8, 1)
    spoilt = first._replace(hidden=first.hidden.at[1, 4:].set(jnp.nan))
    lengths = jnp.array([10, 4, 7])
    found = np.array(token_divergences(spoilt, second, lengths, chunk_size=3))
    whole = np.array(token_divergences(first, second, chunk_size=3))
    counted = np.arange(10) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(found, np.where(counted, whole, 0))


def test_logits_of_all_tokens_never_exist() -> None:
    rows, positions, vocabulary = 2, 512, 1000
    model = ModelHead(jnp.zeros((rows, positions, 4)), jnp.zeros((4, vocabulary)))

    def both(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_divergences(ModelHead(hidden, head), ModelHead(2 * hidden, head), chunk_size=16)

    compiled = jax.jit(both).lower(model.hidden, model.head).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < rows * positions * vocabulary  # a quarter of one array of logits


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="same vocabulary"):
        token_divergences(categorical([0.5, 0.5]), categorical([0.2, 0.3, 0.5]))
