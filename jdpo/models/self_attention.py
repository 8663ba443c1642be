"""Self-attention of a layer, over padded rows, packed rows, prompts, or a cache.

Axes: n sequences, t positions, p prompts, r rows of a prompt, d model, h heads, g key/value heads, k head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jdpo.devices import target
from jdpo.models.attention import (
    LayerCache,
    cached_attention,
    causal_attention,
    choose_attention,
    dot_product_attention,
    sequences_per_row,
    sharded_causal_attention,
    write_tails,
)
from jdpo.models.attention.splash import tiling
from jdpo.models.context import Context, LayerKeys
from jdpo.models.layers import INIT_STDDEV, Norm, Projection
from jdpo.models.mesh_axes import sequence_and_head_axes
from jdpo.models.model_config import LayerKind, ModelConfig
from jdpo.models.packed_attention import attend_packed
from jdpo.models.rope import apply_rope


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
            target().platform,
            dtype,
            config.head_dim,
            length,
            softcap=config.attention_softcap,
            window=window,
            sinks=config.attention_sinks,
            tiled=bool(self.block_q or self.block_kv),
        )

    def sequences_per_row(self, dtype: Any, config: ModelConfig, longest: int) -> int | None:
        """Returns the most sequences that an attention row of up to `longest` places should hold; None: no limit."""
        # Short rows may have another backend than long ones, and layers with a window another than those without.
        backends = {self.resolve(dtype, config, length, window) for length in (1, longest) for window in config.windows}
        limits = (sequences_per_row(backend, target().platform) for backend in backends)
        return min((limit for limit in limits if limit is not None), default=None)

    def padded_length(self, dtype: Any, config: ModelConfig, length: int) -> int:
        """Returns the places that attention computes for rows of this length: splash fills its tiles."""
        if "splash" not in {self.resolve(dtype, config, length, window) for window in config.windows}:
            return length
        return tiling(length, self.block_q, self.block_kv).padded_length


class Attention(nn.Module):
    """Grouped-query self-attention, with the options of `ModelConfig` and `LayerKind`."""

    config: ModelConfig
    kind: LayerKind
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, cache: LayerCache | None, context: Context
    ) -> tuple[jax.Array, LayerCache | LayerKeys | None]:
        """Returns the branch's output, and the longer cache or the prompts' keys and values where there are such."""
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
            query, key = (apply_rope(x, tables, interleaved=self.kind.rope.interleaved) for x in (query, key))
        if context.query_factors is not None:
            query = query * context.query_factors.astype(query.dtype)
        sinks = self._sinks() if config.attention_sinks else None
        kept: LayerCache | LayerKeys | None = None
        # Keys are kept after their rotation, so that none is rotated again in a later step.
        if cache is not None:
            assert context.tails is not None
            kept = cache = write_tails(cache, key, value, context.tails.slot)
            visible = context.tails.visible[config.windows.index(self.kind.window)]
            softcap, scale = config.attention_softcap, config.attention_scale
            output = cached_attention(query, cache, visible, sinks_h=sinks, softcap=softcap, scale=scale)
        else:
            output = self._attend(query, key, value, sinks, context)
            if context.lengths is not None:
                kept = rearrange(key, "n t g k -> n g k t"), rearrange(value, "n t g k -> n g t k")
        if config.attention_gate:
            output = output * nn.sigmoid(self._project(x_ntd, "gate", config.num_heads, "heads"))
        shape, axes = (config.num_heads, config.head_dim, config.d_model), ("heads", "head_dim", "embed")
        # Heads and head width are contracted together, without a reshape that would hide the sharded axis.
        project = Projection(
            "nthk,hkd->ntd", shape, axes, self.compute_dtype, self.param_dtype, 2, config.o_bias, name="output"
        )
        return project(output), kept

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array | None, context: Context
    ) -> jax.Array:
        if context.packed is not None:
            attend = partial(
                attend_over_mesh,
                self.attention,
                self.config,
                self.kind,
                lengths=rearrange(context.packed.lengths, "r q u -> (r q) u"),
                segments=context.packed.segments,
                sinks=sinks,
            )
            return attend_packed(attend, context.packed, query, key, value)
        if context.lengths is not None:
            operands = (query, key, value, context.lengths)
            return attend_over_mesh(self.attention, self.config, self.kind, *operands, sinks=sinks)
        assert context.positions is not None
        assert context.mask is not None
        return dot_product_attention(
            query,
            key,
            value,
            # Queries and keys are the same tokens.
            query_positions_nt=context.positions,
            key_positions_ns=context.positions,
            key_mask_ns=context.mask,
            sinks_h=sinks,
            window=self.kind.window,
            softcap=self.config.attention_softcap,
            scale=self.config.attention_scale,
        )

    def _sinks(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), ("heads",))
        sinks = self.param("sinks", init, (self.config.num_heads,), self.param_dtype)
        # A term of the softmax, so as wide as that.
        return sinks.astype(jnp.promote_types(self.compute_dtype, jnp.float32))

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
    segments: jax.Array | None = None,
    sinks: jax.Array | None = None,
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
        return causal_attention(query, key, value, lengths=lengths, segments=segments, sinks=sinks, **options)
    # By key heads, so that each is on the same device as the query heads that read it.
    batch_axes, head_axes = sequence_and_head_axes(mesh, key.shape[2])
    options |= {"lengths": lengths, "segments": segments, "sinks": sinks}
    options |= {"batch_axes": batch_axes, "head_axes": head_axes}
    return sharded_causal_attention(query, key, value, mesh=mesh, **options)
