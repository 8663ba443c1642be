"""Attention of one token per answer over a cache in two parts: the prompt, which its answers share, and their tails.

Axes: p prompts, r rows (answers to one prompt), s prompt slots, c tail slots, h query heads, g key/value heads,
m = h // g query heads for each key head, k head width.

    prompt [p, s]      P0 P1 P2 -  -         written once, for all rows; right-padded
    tail [p, r, c]     A0 A1 A2 -  -  -      row 0: token i of the answer is in slot i, at position 3 + i
                       A0 -  -  -  -  -      row 1 began later

A row's index is the slot that its next token is written to; slots from there on are left over from earlier answers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jdpo.models.attention.sinks import softmax_with_sinks


class LayerCache(NamedTuple):
    """Keys and values of one layer, in the layouts in which no product has to transpose the cache.

    Attributes:
      prompt_key: [p, g, k, s].
      prompt_value: [p, g, s, k].
      tail_key: [p, r, g, k, c].
      tail_value: [p, r, g, c, k].
    """

    prompt_key: jax.Array
    prompt_value: jax.Array
    tail_key: jax.Array
    tail_value: jax.Array


class VisibleSlots(NamedTuple):
    """The slots that each row's token sees: bool [p, r, s] of the prompt and [p, r, c] of the tail."""

    prompt: jax.Array
    tail: jax.Array


def visible_slots(
    prompt_lengths_p: jax.Array, index_pr: jax.Array, num_prompt_slots: int, num_tail_slots: int, window: int | None
) -> VisibleSlots:
    """Returns what the token at each row's index sees, itself included.

    >>> import numpy as np
    >>> visible = visible_slots(jnp.array([3]), jnp.array([[0, 2]]), 4, 3, window=4)
    >>> np.asarray(visible.prompt.astype(int)).tolist(), np.asarray(visible.tail.astype(int)).tolist()
    ([[[1, 1, 1, 0], [0, 0, 1, 0]]], [[[1, 0, 0], [1, 1, 1]]])
    """
    prompt_slot, tail_slot = jnp.arange(num_prompt_slots), jnp.arange(num_tail_slots)
    prompt = jnp.broadcast_to(prompt_slot < prompt_lengths_p[:, None, None], (*index_pr.shape, num_prompt_slots))
    tail = tail_slot <= index_pr[..., None]
    if window is not None:
        position_pr1 = (prompt_lengths_p[:, None] + index_pr)[..., None]
        prompt = prompt & (position_pr1 - prompt_slot < window)
        tail = tail & (index_pr[..., None] - tail_slot < window)
    return VisibleSlots(prompt, tail)


def write_tails(cache: LayerCache, key_prgk: jax.Array, value_prgk: jax.Array, index_pr: jax.Array) -> LayerCache:
    """Writes one token's key and value to every row's tail at the row's index."""

    def write(tail: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(tail, new.astype(tail.dtype), index, axis=axis)

    # Mapped, not `.at[..].set`: the mesh then splits the write by prompts as it splits the cache.
    write_rows = jax.vmap(jax.vmap(write, (0, 0, 0, None)), (0, 0, 0, None))
    return cache._replace(
        tail_key=write_rows(cache.tail_key, key_prgk[..., None], index_pr, -1),
        tail_value=write_rows(cache.tail_value, value_prgk[..., None, :], index_pr, -2),
    )


def cached_attention(
    query_prhk: jax.Array,
    cache: LayerCache,
    visible: VisibleSlots,
    *,
    sinks_h: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Grouped-query attention of one token per row, [p, r, h, k]: one softmax over the slots of both parts.

    Arguments and numerics are those of `dot_product_attention`. The prompt's keys are not repeated for its rows.
    """
    num_kv_heads, num_prompt_slots = cache.prompt_value.shape[1:3]
    softmax_dtype = jnp.promote_types(query_prhk.dtype, jnp.float32)
    query_prgmk = rearrange(query_prhk, "p r (g m) k -> p r g m k", g=num_kv_heads)
    # By key heads, as the cache is split, or whole where the mesh does not divide them: not by query heads.
    query_prgmk = nn.with_logical_constraint(query_prgmk, ("batch", None, "act_kv_heads", None, None))
    query_pgrmk = rearrange(query_prgmk, "p r g m k -> p g r m k")
    of_prompt = jnp.einsum("pgrmk,pgks->pgrms", query_pgrmk, cache.prompt_key, preferred_element_type=softmax_dtype)
    of_tail = jnp.einsum("prgmk,prgkc->prgmc", query_prgmk, cache.tail_key, preferred_element_type=softmax_dtype)
    # [p, r, g, m, s + c]
    scores = jnp.concatenate([rearrange(of_prompt, "p g r m s -> p r g m s"), of_tail], axis=-1)
    scores *= query_prhk.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    is_visible = jnp.concatenate(visible, axis=-1)[:, :, None, None]
    # The lowest finite number, not -inf: idle rows of an empty prompt would become NaN.
    scores = jnp.where(is_visible, scores, jnp.finfo(softmax_dtype).min)
    sinks_gm1 = None if sinks_h is None else rearrange(sinks_h, "(g m) -> g m 1", g=num_kv_heads)
    weights = softmax_with_sinks(scores, sinks_gm1).astype(cache.tail_value.dtype)
    prompt_weights = rearrange(weights[..., :num_prompt_slots], "p r g m s -> p g r m s")
    of_prompt = jnp.einsum("pgrms,pgsk->pgrmk", prompt_weights, cache.prompt_value)
    of_tail = jnp.einsum("prgmc,prgck->prgmk", weights[..., num_prompt_slots:], cache.tail_value)
    output = rearrange(of_prompt, "p g r m k -> p r g m k") + of_tail
    output = nn.with_logical_constraint(output, ("batch", None, "act_kv_heads", None, None))
    return rearrange(output, "p r g m k -> p r (g m) k")
