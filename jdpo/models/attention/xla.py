"""Attention as two matrix products around a softmax: keeps all scores, and is the reference for the other backends.

Axes: n sequences, t queries, s keys, h query heads, g key/value heads, r = h // g query heads for each key head,
k head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.attention.blockwise import ATTENTION_RESIDUALS
from jdpo.models.attention.sinks import softmax_with_sinks
from jdpo.models.layers import wide_product


def dot_product_attention(
    query_nthk: jax.Array,
    key_nsgk: jax.Array,
    value_nsgk: jax.Array,
    *,
    query_positions_nt: jax.Array,
    key_positions_ns: jax.Array,
    key_mask_ns: jax.Array,
    segments_nt: jax.Array | None = None,
    sinks_h: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Grouped-query causal attention, [n, t, h, k]; scores and softmax in float32 or wider.

    A query at position p sees the real keys at positions p - window + 1 .. p (all up to p without a window).
    A query that sees nothing, as in a padding row, gets an arbitrary finite value.

    Args:
      key_mask_ns: bool, True on real keys.
      segments_nt: if queries and keys are the same tokens: a query sees the keys of its own segment only.
      sinks_h: see `jdpo.models.attention.sinks`.
      window: number of tokens that a query sees, itself included, as in transformers' sliding_window.
      softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2 (arXiv 2408.00118).
      scale: factor of the scores; the default is k**-0.5.
    """
    num_heads, num_kv_heads, head_dim = query_nthk.shape[2], key_nsgk.shape[2], query_nthk.shape[3]
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    softmax_dtype = jnp.promote_types(query_nthk.dtype, jnp.float32)
    query_ntgrk = rearrange(query_nthk, "n t (g r) k -> n t g r k", g=num_kv_heads)
    # [n, g, r, t, s]: query heads are grouped, so keys are not repeated for each of them.
    scores = wide_product("ntgrk,nsgk->ngrts", query_ntgrk, key_nsgk)
    scores *= head_dim**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible_nts = visible_keys(query_positions_nt, key_positions_ns, key_mask_ns, window)
    if segments_nt is not None:
        visible_nts &= segments_nt[:, :, None] == segments_nt[:, None, :]
    # The lowest finite number, not -inf: a row of only -inf would become NaN.
    scores = jnp.where(visible_nts[:, None, None], scores, jnp.finfo(softmax_dtype).min)
    # Softmax in float32, then the values' dtype, as in transformers' eager attention.
    sinks_gr11 = None if sinks_h is None else rearrange(sinks_h, "(g r) -> g r 1 1", g=num_kv_heads)
    weights = softmax_with_sinks(scores, sinks_gr11).astype(value_nsgk.dtype)
    output = rearrange(jnp.einsum("ngrts,nsgk->ntgrk", weights, value_nsgk), "n t g r k -> n t (g r) k")
    # Only the output: this path has no log-sum-exp, so its backward pass needs the scores.
    return checkpoint_name(output, ATTENTION_RESIDUALS)


def visible_keys(
    query_positions_nt: jax.Array, key_positions_ns: jax.Array, key_mask_ns: jax.Array, window: int | None
) -> jax.Array:
    """Returns bool [n, t, s]: True where a query sees a key.

    >>> import numpy as np
    >>> positions, mask = jnp.arange(4)[None], jnp.array([[True, True, True, False]])
    >>> np.asarray(visible_keys(positions, positions, mask, 2)[0].astype(int)).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    """
    distance_nts = query_positions_nt[:, :, None] - key_positions_ns[:, None, :]
    visible_nts = (distance_nts >= 0) & key_mask_ns[:, None, :]
    return visible_nts if window is None else visible_nts & (distance_nts < window)


def right_padded_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    lengths_n: jax.Array,
    segments_nt: jax.Array | None = None,
    *,
    sinks_h: jax.Array | None = None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Runs `dot_product_attention` of right-padded rows with themselves.

    Args:
      lengths_n: number of real places of each row.
      segments_nt: see `segment_starts`; None if a row holds one sequence.
    """
    # Places serve as positions: within a sequence, distances are the same.
    positions_nt = jnp.broadcast_to(jnp.arange(query_nthk.shape[1]), query_nthk.shape[:2])
    return dot_product_attention(
        query_nthk,
        key_ntgk,
        value_ntgk,
        query_positions_nt=positions_nt,
        key_positions_ns=positions_nt,
        key_mask_ns=positions_nt < lengths_n[:, None],
        segments_nt=segments_nt,
        sinks_h=sinks_h,
        window=window,
        softcap=softcap,
        scale=scale,
    )
