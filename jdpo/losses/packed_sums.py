"""Token log-probs of packed rows to sums of pairs: the packed counterpart of `sequence_logps`.

Axes: r rows, k scored tokens of a row, p items of a row, n sides of an item (chosen, rejected), c = n p completions.
`logp_pair` [r, k] says which completion a token belongs to, n * item + side; anything outside of [0, n p) is padding.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange

Array = Any


def belongs(logp_pair: Array, num_completions: int) -> Array:
    """bool [r, k, c]: which completion each scored token belongs to; none for padding."""
    return logp_pair[..., None] == jnp.arange(num_completions)


def completion_sums(values: Array, belongs_rkc: Array, num_sides: int = 2) -> Array:
    """Sums of [r, k] values over the tokens of each completion, [r, p, n]; what stands on padding is never read.

    >>> logps, ids = jnp.array([[-1.0, -2.0, -4.0, jnp.nan]]), jnp.array([[0, 0, 1, 9]])
    >>> completion_sums(logps, belongs(ids, 2)).tolist()
    [[[-3.0, -4.0]]]
    """
    # Compared and summed, not scattered: the same sum in the same order whatever the device.
    return rearrange(jnp.where(belongs_rkc, values[..., None], 0).sum(-2), "r (p n) -> r p n", n=num_sides)


def tail_weights(belongs_rkc: Array, lengths_rpn: Array, ld_alpha: Array | float, dtype: Any) -> Array:
    """Weight of each scored token under LD-DPO, [r, k]: ld_alpha past the shorter completion of its pair, else 1.

    Args:
      lengths_rpn: int [r, p, 2], scored tokens of each completion.
    """
    ordinal_rkc = jnp.cumsum(belongs_rkc, axis=-2)  # 1 for a completion's first token
    shared_rpn = jnp.broadcast_to(lengths_rpn.min(-1, keepdims=True), lengths_rpn.shape)
    shared_rc = rearrange(shared_rpn, "r p n -> r (p n)")
    is_tail_rk = (belongs_rkc & (ordinal_rkc > shared_rc[:, None])).any(-1)
    return jnp.where(is_tail_rk, jnp.asarray(ld_alpha, dtype), jnp.ones((), dtype))
