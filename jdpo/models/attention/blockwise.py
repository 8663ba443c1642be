"""Causal attention in tiles, in plain JAX: tiles that are fully masked are not computed, and no t x t array exists.

The method is FlashAttention-2 (arXiv 2307.08691): a softmax that runs over the key tiles of a query tile, and a
backward pass of its own that computes the scores again from the log-sum-exp. Loop bounds are computed at run time, so
each loop is compiled once for any length, and the padding of short rows is skipped too. So are the tiles before the
sequence of a tile's first query, where a row holds several:

    A                     rows and columns are tiles: A masked by the diagonal, B by it or by the start of a sequence,
    # A                   # computed without a mask, the rest not at all; the second sequence starts in the third tile
    B B B
    . . B A

Axes: n rows in c groups of b, t places in i query tiles of q or j key tiles of s, h = g * r query heads,
g key/value heads, k head width. In the loops u = b * g are independent products and x = r * q the queries of one key
head. Scores are [u, s, x]: the softmax reduces an axis that is not the innermost, which vectorizes on CPU, and
keys transposed once ([u, k, s]) keep every product in a form that XLA's fast CPU kernels take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.attention.blockwise_tiles import (
    TileOptions,
    TileRows,
    group_size,
    grouped_rows,
    key_tiles,
    num_query_tiles,
    over_key_tiles,
    query_tiles,
    sink_tiles,
    tile_rows,
    tile_size,
    transposed_key_tiles,
    untile_queries,
    visible_in_tile,
)
from jdpo.models.attention.sinks import sinks_gradient
from jdpo.models.layers import scaled

ATTENTION_RESIDUALS = "attention_residuals"
"""Name of the output and log-sum-exp for `jax.checkpoint_policies.save_only_these_names`."""

_HIDDEN = -1e30  # finite: the difference of two hidden scores is 0, not NaN


def blockwise_attention(
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
    block_size: int | None = None,
) -> jax.Array:
    """Grouped-query causal attention of right-padded rows, [n, t, h, k]; scores and softmax in float32 or wider.

    On CPU it loops over rows, so a batch that is split over devices needs `jax.shard_map` around it.

    Args:
      lengths_n: number of real places of each row.
      segments_nt: see `segment_starts`; None if a row holds one sequence.
      sinks_h: see `jdpo.models.attention.sinks`.
      block_size: queries and keys per tile, by default that of `tile_size`.
    """
    length = query_nthk.shape[1]
    block = tile_size(length, block_size, packed=segments_nt is not None, window=window)
    padding = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    padded = (jnp.pad(x, padding) if padding[1][1] else x for x in (query_nthk, key_ntgk, value_ntgk))
    options = TileOptions(block, 0, window, softcap, scale)
    rows = tile_rows(lengths_n.astype(jnp.int32), segments_nt, window, block)
    return _attention(*padded, rows, sinks_h, options)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: TileRows,
    sinks: jax.Array | None,
    options: TileOptions,
) -> jax.Array:
    return _attention_forward(query, key, value, rows, sinks, options)[0]


def _attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: TileRows,
    sinks: jax.Array | None,
    options: TileOptions,
) -> tuple[jax.Array, tuple[Any, ...]]:
    # Named, so that a remat policy can keep them: without these two the backward pass repeats the whole forward loop.
    operands = (query, key, value, rows, sinks)
    output, lse = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in _per_platform(_forward, options, *operands))
    return output, (*operands, output, lse)


def _attention_backward(options: TileOptions, residuals: tuple[Any, ...], d_output: jax.Array) -> tuple[Any, ...]:
    rows = residuals[3]
    *gradients, d_sinks = _per_platform(_backward, options, *residuals, d_output)
    # Integers have no gradient, for which JAX expects this dtype.
    return *gradients, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), rows), d_sinks


_attention.defvjp(_attention_forward, _attention_backward)


def _per_platform(
    function: Callable[..., Any],
    options: TileOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: TileRows,
    *operands: jax.Array | None,
) -> Any:
    """Loops over groups of rows that fit in the cache on CPU, so that short ones end early; elsewhere over all."""
    num_rows, _, num_heads, _ = query.shape
    few = group_size(num_rows, num_heads, options.block, packed=rows.lowest is not None)
    on_cpu, elsewhere = (functools.partial(function, options._replace(group=b)) for b in (few, num_rows))
    # Decided when the program is lowered, since it may be compiled for another platform than this process runs on.
    return lax.platform_dependent(query, key, value, rows, *operands, cpu=on_cpu, default=elsewhere)


def _forward(
    options: TileOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: TileRows,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [n, t, h, k] and the log-sum-exp of the scores [n, t, h], sinks included."""
    num_kv_heads, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)

    def group(operands: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        query_iukx, key_jusk, value_juks, rows = operands

        def query_tile(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            output, lse = results
            query_ukx = query_iukx[i]
            u, k, x = query_ukx.shape
            # Running maximum, sum of weights and weighted values, all in the wide dtype until the last tile.
            state = (*_start((u, x), dtype, sinks, num_kv_heads, options), jnp.zeros((u, k, x), dtype))
            step = functools.partial(_forward_tile, options, rows, query_ukx, key_jusk, value_juks)
            top, total, weighted = over_key_tiles(options, rows, i, key_jusk.shape[0], step, state)
            # Never 0 / 0: on the diagonal every query sees at least itself.
            output = _put(output, i, (weighted / total[:, None]).astype(output.dtype))
            return output, _put(lse, i, top + jnp.log(total))

        i, u, _, x = query_iukx.shape
        empty = jnp.zeros(query_iukx.shape, query.dtype), jnp.zeros((i, u, x), dtype)
        return lax.fori_loop(0, num_query_tiles(rows.length, options), query_tile, empty)

    operands = (
        # Scaling the queries is cheaper than scaling every score.
        query_tiles(scaled(query, options.scale), num_kv_heads, options),
        key_tiles(key, options),
        transposed_key_tiles(value, options),
        grouped_rows(rows, options),
    )
    output_ciukx, lse_ciux = lax.map(group, operands)
    return untile_queries(output_ciukx, num_kv_heads, options), untile_queries(
        lse_ciux[..., None, :], num_kv_heads, options
    )[..., 0]


def _start(
    shape: tuple[int, int], dtype: Any, sinks: jax.Array | None, num_kv_heads: int, options: TileOptions
) -> tuple[jax.Array, jax.Array]:
    """Returns the highest score and the sum of weights before any key; a sink is a score that is already there."""
    if sinks is None:
        return jnp.full(shape, _HIDDEN, dtype), jnp.zeros(shape, dtype)
    return sink_tiles(sinks.astype(dtype), num_kv_heads, options), jnp.ones(shape, dtype)


def _forward_tile(
    options: TileOptions,
    rows: TileRows,
    query_ukx: jax.Array,
    key_jusk: jax.Array,
    value_juks: jax.Array,
    i: jax.Array,
    j: jax.Array,
    state: tuple[jax.Array, ...],
    masked: bool,
) -> tuple[jax.Array, ...]:
    """Updates the running softmax by one tile: highest score, sum of weights, weighted values."""
    top, total, weighted = state
    scores = _soft_cap(_product("usk,ukx->usx", key_jusk[j], query_ukx), options.softcap)
    if masked:
        scores = jnp.where(visible_in_tile(options, rows, i, j, query_ukx.shape), scores, _HIDDEN)
    # Earlier sums are relative to the old maximum; `kept` converts them to the new one.
    new_top = jnp.maximum(top, scores.max(1))
    weights, kept = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
    # Weights take the values' dtype for a fast product, which still accumulates in float32 or wider.
    values = _product("uks,usx->ukx", value_juks[j], weights.astype(value_juks.dtype))
    return new_top, total * kept + weights.sum(1), weighted * kept[:, None] + values


def _backward(
    options: TileOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: TileRows,
    sinks: jax.Array | None,
    output: jax.Array,
    lse: jax.Array,
    d_output: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns the gradients of query, key, value and sinks."""
    num_kv_heads = key.shape[2]
    # The term that the softmax's gradient subtracts: sum_k output * d_output, for each query.
    delta = jnp.sum(output.astype(lse.dtype) * d_output.astype(lse.dtype), axis=-1)

    def group(operands: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        query_iukx, d_output_iukx, lse_iux, delta_iux, key_jusk, key_juks, value_jusk, rows = operands

        def query_tile(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, d_key, d_value = gradients
            of_query = (query_iukx[i], d_output_iukx[i], lse_iux[i], delta_iux[i])
            step = functools.partial(_backward_tile, options, rows, *of_query, key_jusk, key_juks, value_jusk)
            start = (jnp.zeros(query_iukx.shape[1:], lse.dtype), d_key, d_value)
            d_query_ukx, d_key, d_value = over_key_tiles(options, rows, i, key_jusk.shape[0], step, start)
            return _put(d_query, i, d_query_ukx), d_key, d_value

        # Key and value gradients are sums over many query tiles, so they stay wide and are rounded once at the end.
        zeros = tuple(jnp.zeros(x.shape, lse.dtype) for x in (query_iukx, key_jusk, value_jusk))
        return lax.fori_loop(0, num_query_tiles(rows.length, options), query_tile, zeros)

    operands = (
        query_tiles(scaled(query, options.scale), num_kv_heads, options),
        query_tiles(d_output, num_kv_heads, options),
        *(query_tiles(x[..., None], num_kv_heads, options)[..., 0, :] for x in (lse, delta)),
        key_tiles(key, options),
        transposed_key_tiles(key, options),
        key_tiles(value, options),
        grouped_rows(rows, options),
    )
    d_query, d_key, d_value = lax.map(group, operands)
    # The tiles used scaled queries: their own gradient still lacks the factor, that of the keys already has it.
    d_query = untile_queries(d_query, num_kv_heads, options) * options.scale
    d_key, d_value = (rearrange(x, "c j (b g) s k -> (c b) (j s) g k", b=options.group) for x in (d_key, d_value))
    d_sinks = None if sinks is None else sinks_gradient(sinks, lse, delta)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), d_sinks


def _backward_tile(
    options: TileOptions,
    rows: TileRows,
    query_ukx: jax.Array,
    d_output_ukx: jax.Array,
    lse_ux: jax.Array,
    delta_ux: jax.Array,
    key_jusk: jax.Array,
    key_juks: jax.Array,
    value_jusk: jax.Array,
    i: jax.Array,
    j: jax.Array,
    gradients: tuple[jax.Array, ...],
    masked: bool,
) -> tuple[jax.Array, ...]:
    """Adds one tile's part to the query gradient of tile i and the key and value gradients of tile j."""
    d_query, d_key, d_value = gradients
    scores = _soft_cap(_product("usk,ukx->usx", key_jusk[j], query_ukx), options.softcap)
    d_weights = _product("usk,ukx->usx", value_jusk[j], d_output_ukx)
    # The softmax itself, from the scores and the log-sum-exp that the forward pass kept.
    weights = jnp.exp(scores - lse_ux[:, None])
    if masked:
        # Selected after the exponential, which may overflow for hidden keys.
        weights = jnp.where(visible_in_tile(options, rows, i, j, query_ukx.shape), weights, 0)
    d_scores = weights * (d_weights - delta_ux[:, None])
    if options.softcap is not None:
        # tanh' = 1 - tanh^2, and the capped score is softcap * tanh.
        d_scores *= 1 - jnp.square(scores / options.softcap)
    weights, d_scores = weights.astype(query_ukx.dtype), d_scores.astype(query_ukx.dtype)
    d_query += _product("uks,usx->ukx", key_juks[j], d_scores)
    d_key = _put(d_key, j, d_key[j] + _product("usx,ukx->usk", d_scores, query_ukx))
    d_value = _put(d_value, j, d_value[j] + _product("usx,ukx->usk", weights, d_output_ukx))
    return d_query, d_key, d_value


def _soft_cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _put(x: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, row, index, 0)
