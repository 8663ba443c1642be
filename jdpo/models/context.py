"""The inputs that the layers of one pass share: where tokens are, and which of them see each other.

Axes: n sequences, t positions, p prompts, r rows of a prompt, g key/value heads, k head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from jdpo.models.attention import LayerCache, VisibleSlots
from jdpo.models.delta.delta_cache import DeltaCache, DeltaState
from jdpo.models.packed_attention import PackedSequences
from jdpo.models.rope import RopeTables


class Context(NamedTuple):
    """Inputs that all layers share.

    Attention is given by one of `positions` and `mask` (padded rows), `packed` (flat rows), `lengths` (prompts, whose
    keys and values are kept) and `tails` (with a cache).

    Attributes:
      ropes: the tables of `ModelConfig.ropes`, in the same order.
      token_weights: [n, t], weights of tokens in a router's statistics; 0 on padding.
      query_factors: [n, t, 1, 1], factors of queries, for a model with `ModelConfig.query_scaling`.
      positions, mask: int and bool [n, t].
      lengths: int [n], of right-padded prompts.
    """

    ropes: tuple[RopeTables, ...]
    token_weights: jax.Array
    query_factors: jax.Array | None = None
    positions: jax.Array | None = None
    mask: jax.Array | None = None
    packed: PackedSequences | None = None
    lengths: jax.Array | None = None
    tails: Tails | None = None


class Tails(NamedTuple):
    """The slot that a token of every answer writes, and those that it sees.

    Attributes:
      slot: int [p, r], the slot of the tail that is written.
      visible: for each of `ModelConfig.windows`, the slots that the token sees.
    """

    slot: jax.Array
    visible: tuple[VisibleSlots, ...]


LayerKeys = tuple[jax.Array, jax.Array]
"""Keys [n, g, k, t] and values [n, g, t, k] of prompts in one layer, as `LayerCache` holds them."""

Cache = LayerCache | DeltaCache
"""The cache of a layer in decoding, by its mixer. Both have the methods that the engine calls."""

Kept = Cache | LayerKeys | DeltaState
"""The result that a layer keeps: the cache after a token, or the part of prompts that caches of their answers need."""
