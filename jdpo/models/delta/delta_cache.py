"""The cache of a gated DeltaNet in decoding: a state of fixed size, not keys and values of every token.

Axes: p prompts, r rows (answers to one prompt), w taps of the convolution, g key heads, m value heads of a key head,
k key width, v value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdpo.models.delta.delta_rule import state_dtype
from jdpo.models.model_config import DeltaConfig


class DeltaState(NamedTuple):
    """The state after the tokens of a sequence; the dots are p, or p and r.

    Attributes:
      query, key: [.., w - 1, g, k], the last tokens before the convolution; 0 before the first one.
      value: [.., w - 1, g, m, v].
      state: [.., g, m, k, v], in float32 or wider.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    state: jax.Array


class DeltaCache(NamedTuple):
    """The states after the prompts [p, ..], from which all their answers begin, and those of the answers [p, r, ..].

    An answer's state is arbitrary before its first token.
    """

    prompt: DeltaState
    tail: DeltaState

    def states(self, index_pr: jax.Array) -> DeltaState:
        """Returns the state before the token of every row; that of number 0 in its answer follows the prompt."""

        def begun(prompt: jax.Array, tail: jax.Array) -> jax.Array:
            is_first = (index_pr == 0)[(..., *[None] * (tail.ndim - 2))]
            return jnp.where(is_first, prompt[:, None], tail)

        return jax.tree.map(begun, self.prompt, self.tail)

    def insert(self, places: jax.Array, prompts: DeltaState) -> DeltaCache:
        """Writes the states of prompts [b, ..] to places, int [b]; a place past the last one means none."""

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[places].set(new.astype(old.dtype), mode="drop")

        return self._replace(prompt=jax.tree.map(write, self.prompt, prompts))

    def with_prompts_of(self, source: jax.Array) -> DeltaCache:
        """Gives place i the prompt of place source[i]."""
        return self._replace(prompt=jax.tree.map(lambda array: array[source], self.prompt))

    def with_tails_of(self, source: jax.Array) -> DeltaCache:
        """Gives the rows of place i the states of those of place source[i]."""
        return self._replace(tail=jax.tree.map(lambda array: array[source], self.tail))

    def resize(self, prompt_slots: int, tail_slots: int) -> DeltaCache:
        """Returns itself: a state has no slots."""
        del prompt_slots, tail_slots
        return self

    def placed(self) -> DeltaCache:
        """Splits places over the batch axes of the mesh and heads over `tensor`."""
        return DeltaCache(_placed(self.prompt, ("batch",)), _placed(self.tail, ("batch", None)))


def _placed(state: DeltaState, lead: tuple[str | None, ...]) -> DeltaState:
    heads, place = "act_kv_heads", nn.with_logical_constraint
    return DeltaState(
        query=place(state.query, (*lead, None, heads, None)),
        key=place(state.key, (*lead, None, heads, None)),
        value=place(state.value, (*lead, None, heads, None, None)),
        state=place(state.state, (*lead, heads, None, None, None)),
    )


def empty_delta_cache(config: DeltaConfig, dtype: Any, num_places: int, num_rows: int) -> DeltaCache:
    """Returns the cache of one layer, of zeros.

    Args:
      dtype: of activations.
    """
    heads, shared = config.num_key_heads, config.values_per_key
    before = config.conv_width - 1

    def zeros(*lead: int) -> DeltaState:
        keys = jnp.zeros((*lead, before, heads, config.key_head_dim), dtype)
        values = jnp.zeros((*lead, before, heads, shared, config.value_head_dim), dtype)
        state = (*lead, heads, shared, config.key_head_dim, config.value_head_dim)
        return DeltaState(keys, keys, values, jnp.zeros(state, state_dtype(dtype)))

    return DeltaCache(zeros(num_places), zeros(num_places, num_rows))
