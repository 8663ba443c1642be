"""Draws token ids from logits: pure functions of (logits, key).

Axes: n sequences, v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Sampling settings: temperature 0 is greedy; top_k and then top_p, if set, limit the choice of tokens."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a negative temperature, a top_k below 1, a top_p outside (0, 1]."""
    # Not `< 0`, so that NaN is refused as well.
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {sampling.temperature}")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, or None, found {sampling.top_k}")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p: expected a share in (0, 1], or None, found {sampling.top_p}")


def sample(logits_nv: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, int32 [n]; a draw depends on the row's index and the key, not on other rows."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_nv, axis=-1).astype(jnp.int32)
    logits_nv = logits_nv / sampling.temperature
    if sampling.top_k is not None:
        logits_nv = keep_top_k(logits_nv, sampling.top_k)
    if sampling.top_p is not None:
        logits_nv = keep_top_p(logits_nv, sampling.top_p)
    # One key per row, so that its draw depends on its index and the key alone.
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_nv.shape[0]))
    return jax.vmap(jax.random.categorical)(row_keys, logits_nv).astype(jnp.int32)


def keep_top_k(logits_nv: jax.Array, top_k: int) -> jax.Array:
    """Sets all except the top_k largest logits of each row to -inf; ties with the smallest one kept are kept as well.

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    smallest_kept = jax.lax.top_k(logits_nv, min(top_k, logits_nv.shape[-1]))[0][:, -1:]  # top_k refuses k > v
    return jnp.where(logits_nv < smallest_kept, -jnp.inf, logits_nv)


def keep_top_p(logits_nv: jax.Array, top_p: float) -> jax.Array:
    """Keeps the fewest most probable tokens that together reach top_p (at least one); sets the others to -inf.

    This is nucleus sampling, arXiv 1904.09751. Ties with the least probable token kept are kept as well.

    >>> jnp.isfinite(keep_top_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.6)).tolist()
    [[True, True, False]]
    """
    descending = -jnp.sort(-logits_nv, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most probable token has nothing before it, but rounding must not be able to remove it.
    kept = (before < top_p).at[:, 0].set(True)
    # A threshold instead of undoing the sort: all logits from the smallest kept one on stay.
    smallest_kept = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_nv < smallest_kept, -jnp.inf, logits_nv)
