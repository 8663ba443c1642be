"""Attention against a loop over heads and queries in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.attention import causal_attention, dot_product_attention


def by_hand(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    window: int | None,
    softcap: float | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Computes attention sequence by sequence and query by query; positions are slots."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for n, t, h in np.ndindex(*q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if mask[n, s]]
        scores = np.array([q[n, t, h] @ k[n, s, h // group] for s in seen]) * (scale or 1 / np.sqrt(q.shape[3]))
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[n, t, h] = (weights / weights.sum()) @ np.stack([v[n, s, h // group] for s in seen])
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_equals_a_loop_over_heads_and_queries(num_kv_heads: int, window: int | None) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, num_kv_heads, 4)).astype(np.float32)
    mask = np.ones((2, 7), bool)
    mask[1, 5:] = False
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    result = dot_product_attention(
        q, k, v, query_positions_nt=positions, key_positions_ns=positions, key_mask_ns=mask, window=window
    )
    np.testing.assert_allclose(result, by_hand(q, k, v, mask, window), atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_soft_cap_scale_and_lengths_equal_the_loop(backend: str) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 7, 4, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, 2, 4)).astype(np.float32)
    mask = np.arange(7) < np.array([[7], [5]])
    options = {"window": 3, "softcap": 1.5, "scale": 0.9}
    result = causal_attention(*map(jnp.asarray, (q, k, v)), lengths=jnp.array([7, 5]), backend=backend, **options)
    np.testing.assert_allclose(np.asarray(result)[mask], by_hand(q, k, v, mask, **options)[mask], atol=1e-5)


def test_a_row_that_sees_nothing_is_finite_and_scores_stay_float32() -> None:
    q = jnp.full((1, 2, 1, 4), 100.0, jnp.bfloat16)
    positions = jnp.arange(2)[None]
    result = dot_product_attention(
        q,
        q,
        q,
        query_positions_nt=positions,
        key_positions_ns=positions,
        key_mask_ns=jnp.zeros((1, 2), bool),
    )
    assert result.dtype == jnp.bfloat16
    assert jnp.isfinite(result).all()
