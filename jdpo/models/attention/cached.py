"""Attention of one token per answer over a cache in two parts: the prompt, which its answers share, and their tails.

Axes: p prompts, r rows (answers to one prompt), s prompt slots, c tail slots, h query heads, g key/value heads,
m = h // g query heads for each key head, k head width.

    prompt [p, s]      P0 P1 P2 -  -         written once, for all rows; right-padded
    tail [p, r, c]     A0 A1 A2 -  -  -      row 0: token i of the answer is in slot i, at position 3 + i
                       A0 -  -  -  -  -      row 1 began later

A row's index is the slot that its next token is written to; slots from there on are left over from earlier answers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

    @property
    def num_slots(self) -> tuple[int, int]:
        """The slots of prompts and of tails, s and c."""
        return self.prompt_key.shape[-1], self.tail_key.shape[-1]

    def insert(self, places: jax.Array, prompts: tuple[jax.Array, jax.Array]) -> LayerCache:
        """Writes keys [b, g, k, t] and values [b, g, t, k] of prompts to places, int [b]; past the last means none."""

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            # The first slots are replaced; keys have them last, values before the head's width.
            return old.at[places, :, : new.shape[2], : new.shape[3]].set(new.astype(old.dtype), mode="drop")

        key, value = prompts
        return self._replace(prompt_key=write(self.prompt_key, key), prompt_value=write(self.prompt_value, value))

    def with_prompts_of(self, source: jax.Array) -> LayerCache:
        """Gives place i the prompt of place source[i]."""
        return self._replace(prompt_key=self.prompt_key[source], prompt_value=self.prompt_value[source])

    def with_tails_of(self, source: jax.Array) -> LayerCache:
        """Gives the rows of place i the tails of those of place source[i]."""
        return self._replace(tail_key=self.tail_key[source], tail_value=self.tail_value[source])

    def resize(self, prompt_slots: int, tail_slots: int) -> LayerCache:
        """Returns the cache with more slots; the new ones are at the end."""

        def grow(array: jax.Array, num_slots: int, axis: int) -> jax.Array:
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, num_slots - array.shape[axis])
            return jnp.pad(array, padding)

        return LayerCache(
            prompt_key=grow(self.prompt_key, prompt_slots, -1),
            prompt_value=grow(self.prompt_value, prompt_slots, -2),
            tail_key=grow(self.tail_key, tail_slots, -1),
            tail_value=grow(self.tail_value, tail_slots, -2),
        )

    def placed(self) -> LayerCache:
        """Splits places over the batch axes of the mesh and heads over `tensor`."""
        prompt, tail = ("batch", "act_kv_heads", None, None), ("batch", None, "act_kv_heads", None, None)
        place = nn.with_logical_constraint
        return LayerCache(*(place(array, prompt) for array in self[:2]), *(place(array, tail) for array in self[2:]))


def empty_layer_cache(
    num_heads: int, head_dim: int, dtype: Any, num_places: int, num_rows: int, prompt_slots: int, tail_slots: int
) -> LayerCache:
    """Returns the cache of one layer, of zeros.

    Args:
      num_heads: g.
    """
    prompt = jnp.zeros((num_places, num_heads, prompt_slots, head_dim), dtype)
    tail = jnp.zeros((num_places, num_rows, num_heads, tail_slots, head_dim), dtype)
    # Keys have their slots last.
    return LayerCache(prompt.mT, prompt, tail.mT, tail)


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
