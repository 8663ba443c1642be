"""Self-attention of a layer, over padded rows, packed rows, or a cache.

Axes: n sequences, t positions, s cache slots, d model, h heads, g key/value heads, k head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jdpo.models.attention import (
    causal_attention,
    choose_attention,
    dot_product_attention,
    sharded_causal_attention,
)
from jdpo.models.layers import Norm, Projection
from jdpo.models.mesh_axes import mesh_axes
from jdpo.models.model_config import LayerKind, ModelConfig
from jdpo.models.packed_attention import PackedSequences, to_sequences, to_slots
from jdpo.models.rope import RopeTables, apply_rope


class Context(NamedTuple):
    """Inputs that all layers share.

    Attention is given either by `packed`, for flat rows, or by positions and masks. `ropes` has the tables of
    `ModelConfig.ropes`, in the same order.
    """

    ropes: tuple[RopeTables, ...]
    query_positions: jax.Array | None
    key_positions: jax.Array | None
    key_mask: jax.Array | None
    token_weights: jax.Array | None = None  # [n, t], weights of tokens in a router's statistics; 0 on padding
    write_index: jax.Array | None = None  # None without a cache
    packed: PackedSequences | None = None


class AttentionSettings(NamedTuple):
    """Settings of attention over packed rows; see `causal_attention`.

    Attributes:
      backend: "auto" selects the backend with `choose_attention`, by length.
    """

    backend: str = "auto"
    block_q: int | None = None
    block_kv: int | None = None

    def resolve(self, dtype: Any, config: ModelConfig, length: int, window: int | None) -> str:
        """Returns the backend for sequences of `length` places, in layers with this window."""
        if self.backend != "auto":
            return self.backend
        return choose_attention(
            jax.default_backend(),
            dtype,
            config.head_dim,
            length,
            softcap=config.attention_softcap,
            window=window,
            tiled=bool(self.block_q or self.block_kv),
        )


class Attention(nn.Module):
    """Grouped-query self-attention, with the options of `ModelConfig` and `LayerKind`."""

    config: ModelConfig
    kind: LayerKind
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, cache: dict[str, jax.Array] | None, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        config = self.config
        query = self._project(x_ntd, "query", config.num_heads, "heads")
        key = self._project(x_ntd, "key", config.num_kv_heads, "kv_heads")
        value = self._project(x_ntd, "value", config.num_kv_heads, "kv_heads")
        # Before the rotation, as in transformers: the norm's weights belong to elements that are not rotated.
        if config.qk_norm is not None:
            query, key = self._norm(query, "query_norm", "heads"), self._norm(key, "key_norm", "kv_heads")
        if self.kind.rope is not None:
            # The tables are computed once per distinct rope, not in every layer.
            tables = context.ropes[config.ropes.index(self.kind.rope)]
            query, key = (apply_rope(x, tables) for x in (query, key))
        if cache is not None:
            assert context.write_index is not None
            # New keys and values go to the next free slots of the cache.
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=context.write_index, axis=1)
            # Keys are cached after their rotation, so that none is rotated again in a later step.
            key = write(cache["key"], key.astype(cache["key"].dtype))
            value = write(cache["value"], value.astype(cache["value"].dtype))
            cache = {"key": key, "value": value}
        output = self._attend(query, key, value, context)
        shape, axes = (config.num_heads, config.head_dim, config.d_model), ("heads", "head_dim", "embed")
        # Heads and head width are contracted together, without a reshape that would hide the sharded axis.
        project = Projection(
            "nthk,hkd->ntd", shape, axes, self.compute_dtype, self.param_dtype, 2, config.o_bias, name="output"
        )
        return project(output), cache

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context) -> jax.Array:
        if context.packed is not None:
            # A prompt is copied to each of its branches, so attention needs no mask of its own for them.
            # [r, s, h, k] -> [(r q), t, h, k]
            query, key, value = (to_sequences(x, context.packed) for x in (query, key, value))
            # [r, q] -> [(r q)]
            lengths = context.packed.lengths.reshape(-1)
            output = attend_over_mesh(self.attention, self.config, self.kind, query, key, value, lengths)
            return to_slots(output, context.packed)
        assert context.query_positions is not None
        assert context.key_positions is not None
        assert context.key_mask is not None
        return dot_product_attention(
            query,
            key,
            value,
            query_positions_nt=context.query_positions,
            key_positions_ns=context.key_positions,
            key_mask_ns=context.key_mask,
            window=self.kind.window,
            softcap=self.config.attention_softcap,
            scale=self.config.attention_scale,
        )

    def _norm(self, x_nthk: jax.Array, name: str, axis: str) -> jax.Array:
        # Qwen3 and Gemma 3 share one weight [k] among all heads; OLMo 2 has a weight for each element of each head.
        axes = ("head_dim",) if self.config.qk_norm == "head" else (axis, "head_dim")
        return Norm(self.config.norm, self.config.norm_eps, axes, self.param_dtype, name=name)(x_nthk)

    def _project(self, x_ntd: jax.Array, name: str, num_heads: int, axis: str) -> jax.Array:
        shape, axes = (self.config.d_model, num_heads, self.config.head_dim), ("embed", axis, "head_dim")
        bias = self.config.qkv_bias
        project = Projection("ntd,dhk->nthk", shape, axes, self.compute_dtype, self.param_dtype, 1, bias, name=name)
        # Split by heads, which are independent, so that attention itself needs no communication.
        return nn.with_logical_constraint(project(x_ntd), ("batch", "act_length", f"act_{axis}", "act_head_dim"))


def attend_over_mesh(
    settings: AttentionSettings,
    config: ModelConfig,
    kind: LayerKind,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Runs `causal_attention` on each device's own sequences and heads, as the logical rules in context split them."""
    options: dict[str, Any] = {
        "window": kind.window,
        "softcap": config.attention_softcap,
        "scale": config.attention_scale,
        "backend": settings.resolve(query.dtype, config, query.shape[1], kind.window),
        "block_q": settings.block_q,
        "block_kv": settings.block_kv,
    }
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.empty:
        return causal_attention(query, key, value, lengths=lengths, **options)
    # By key heads, so that each is on the same device as the query heads that read it.
    batch_axes, head_axes = (mesh_axes(name) for name in ("batch", "act_kv_heads"))
    if key.shape[2] % math.prod(mesh.shape[axis] for axis in head_axes):
        head_axes = ()  # heads that the mesh does not divide evenly are replicated
    return sharded_causal_attention(
        query, key, value, lengths=lengths, mesh=mesh, batch_axes=batch_axes, head_axes=head_axes, **options
    )
