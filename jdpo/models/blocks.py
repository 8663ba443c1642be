"""The decoder's layers, and how they fall into a scanned stack of repeats and an unrolled rest.

Axes: n sequences, t positions, s cache slots, d model, h heads, g key/value heads, k head width, v vocabulary.

The layers repeat a pattern of kinds, of period p. `stack` holds num_layers // p repeats of it, each parameter with a
leading "layers" axis; `rest` holds the num_layers % p layers left over. So what a kind says stays static.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jdpo.models.attention import (
    causal_attention,
    choose_attention,
    dot_product_attention,
    sharded_causal_attention,
)
from jdpo.models.config import LayerKind, ModelConfig
from jdpo.models.layers import INIT_STDDEV, GatedMLP, Projection, RMSNorm, apply_rope
from jdpo.models.lookup import lookup
from jdpo.models.packed import PackedSequences, to_sequences, to_slots
from jdpo.models.remat import REMAT_POLICIES, named_layer_input

LayerCache = dict[str, dict[str, jax.Array]]
"""{"layer_j": {"key": [.., n, s, g, k], "value": the same}}, with a leading repeats axis in the stack."""


RopeTables = tuple[jax.Array, jax.Array]
"""Cosines and sines, see `rope_tables`."""


class Context(NamedTuple):
    """What every layer reads and none changes.

    Either `packed` says where attention finds its sequences in flat rows, or positions and masks say what sees what.
    `ropes` has the tables of `ModelConfig.ropes`, in their order.
    """

    ropes: tuple[RopeTables, ...]
    query_positions: jax.Array | None
    key_positions: jax.Array | None
    key_mask: jax.Array | None
    write_index: jax.Array | None = None  # None without a cache
    packed: PackedSequences | None = None


class AttentionSettings(NamedTuple):
    """What runs attention over packed rows; see `causal_attention`.

    Attributes:
      backend: "auto" takes what `choose_attention` takes for the length.
    """

    backend: str = "auto"
    block_q: int | None = None
    block_kv: int | None = None

    def resolve(self, dtype: Any, head_dim: int, length: int, window: int | None) -> str:
        """The backend for sequences of `length` places."""
        if self.backend != "auto":
            return self.backend
        tiled = bool(self.block_q or self.block_kv)
        return choose_attention(jax.default_backend(), dtype, head_dim, length, window=window, tiled=tiled)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, optional biases, QK norms and sliding window."""

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
        if config.qk_norm:
            query = RMSNorm(config.norm_eps, "head_dim", self.param_dtype, name="query_norm")(query)
            key = RMSNorm(config.norm_eps, "head_dim", self.param_dtype, name="key_norm")(key)
        if self.kind.rope is not None:
            tables = context.ropes[config.ropes.index(self.kind.rope)]
            query, key = (apply_rope(x, *tables) for x in (query, key))
        if cache is not None:
            assert context.write_index is not None
            start = (0, context.write_index, 0, 0)
            key = jax.lax.dynamic_update_slice(cache["key"], key.astype(cache["key"].dtype), start)
            value = jax.lax.dynamic_update_slice(cache["value"], value.astype(cache["value"].dtype), start)
            cache = {"key": key, "value": value}
        output = self._attend(query, key, value, context)
        shape, axes = (config.num_heads, config.head_dim, config.d_model), ("heads", "head_dim", "embed")
        project = Projection(
            "nthk,hkd->ntd", shape, axes, self.compute_dtype, self.param_dtype, 2, config.o_bias, name="output"
        )
        return project(output), cache

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context) -> jax.Array:
        if context.packed is not None:
            query, key, value = (to_sequences(x, context.packed) for x in (query, key, value))
            lengths = context.packed.lengths.reshape(-1)
            output = attend_over_mesh(self.attention, query, key, value, lengths, window=self.kind.window)
            return to_slots(output, context.packed)
        return dot_product_attention(
            query,
            key,
            value,
            query_positions_nt=context.query_positions,
            key_positions_ns=context.key_positions,
            key_mask_ns=context.key_mask,
            window=self.kind.window,
        )

    def _project(self, x_ntd: jax.Array, name: str, num_heads: int, axis: str) -> jax.Array:
        shape, axes = (self.config.d_model, num_heads, self.config.head_dim), ("embed", axis, "head_dim")
        bias = self.config.qkv_bias
        project = Projection("ntd,dhk->nthk", shape, axes, self.compute_dtype, self.param_dtype, 1, bias, name=name)
        return nn.with_logical_constraint(project(x_ntd), ("batch", "act_length", f"act_{axis}", "act_head_dim"))


def attend_over_mesh(
    settings: AttentionSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """`causal_attention` on each device's own sequences and heads, as the logical rules in context split them."""
    options: dict[str, Any] = {
        "window": window,
        "backend": settings.resolve(query.dtype, query.shape[3], query.shape[1], window),
        "block_q": settings.block_q,
        "block_kv": settings.block_kv,
    }
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.empty:
        return causal_attention(query, key, value, lengths=lengths, **options)
    batch_axes, head_axes = (_mesh_axes(name) for name in ("batch", "act_kv_heads"))
    if key.shape[2] % math.prod(mesh.shape[axis] for axis in head_axes):
        head_axes = ()  # heads that the mesh does not divide are whole on each device
    return sharded_causal_attention(
        query, key, value, lengths=lengths, mesh=mesh, batch_axes=batch_axes, head_axes=head_axes, **options
    )


def _mesh_axes(logical_name: str) -> tuple[str, ...]:
    """Mesh axes that the rules in context split a logical axis over."""
    axes = nn.logical_to_mesh_axes((logical_name,))[0]
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    config: ModelConfig
    kind: LayerKind
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, cache: dict[str, jax.Array] | None, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        config, dtypes = self.config, (self.compute_dtype, self.param_dtype)
        x_ntd = named_layer_input(x_ntd)
        normed = RMSNorm(config.norm_eps, "norm", self.param_dtype, name="attention_norm")(x_ntd)
        attend = Attention(config, self.kind, *dtypes, self.attention, name="attention")
        attended, cache = attend(normed, cache, context)
        x_ntd = constrain_stream(x_ntd + attended)
        normed = RMSNorm(config.norm_eps, "norm", self.param_dtype, name="mlp_norm")(x_ntd)
        x_ntd = x_ntd + GatedMLP(config.d_model, config.d_ff, *dtypes, name="mlp")(normed)
        return constrain_stream(x_ntd), cache


class LayerGroup(nn.Module):
    """Consecutive layers `layer_0` .., each of its own kind; the body of the scan, and the rest behind it."""

    config: ModelConfig
    kinds: tuple[LayerKind, ...]
    compute_dtype: Any
    param_dtype: Any
    attention: AttentionSettings
    remat: str
    scanned: bool

    @nn.compact
    def __call__(
        self, x_ntd: jax.Array, cache: LayerCache | None, context: Context
    ) -> tuple[jax.Array, LayerCache | None]:
        layer_class: Any = DecoderLayer
        if self.remat != "none":
            # Within a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
            policy = REMAT_POLICIES[self.remat]
            layer_class = nn.remat(DecoderLayer, policy=policy, prevent_cse=not self.scanned)
        new_cache: LayerCache = {}
        for index, kind in enumerate(self.kinds):
            name = f"layer_{index}"
            layer = layer_class(self.config, kind, self.compute_dtype, self.param_dtype, self.attention, name=name)
            x_ntd, new_cache[name] = layer(x_ntd, None if cache is None else cache[name], context)
        return x_ntd, None if cache is None else new_cache


class Embedding(nn.Module):
    """The token table [v, d], which is the output head too where the two are tied."""

    config: ModelConfig
    compute_dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), ("vocab", "embed"))
        shape = (self.config.vocab_size, self.config.d_model)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, tokens_nt: jax.Array) -> jax.Array:
        # Gathered over fsdp like every weight: XLA looks rows up in a table split along d by moving the whole batch.
        table = nn.with_logical_constraint(self.embedding, ("vocab", None))
        return constrain_stream(lookup(table, tokens_nt).astype(self.compute_dtype))

    def head(self) -> jax.Array:
        """The table as a head kernel, [d, v]."""
        return self.embedding.T


class Head(nn.Module):
    """An untied output head, [d, v]."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), ("embed", "vocab"))
        return self.param("kernel", init, (self.config.d_model, self.config.vocab_size), self.param_dtype)


def constrain_stream(x_ntd: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x_ntd, ("batch", "act_length", "act_embed"))
