"""Causal attention in tiles, in plain JAX: tiles that are fully masked are not computed, and no t x t array exists.

The method is FlashAttention-2 (arXiv 2307.08691): a softmax that runs over the key tiles of a query tile, and a
backward pass of its own that computes the scores again from the log-sum-exp. Loop bounds are computed at run time, so
each loop is compiled once for any length, and the padding of short sequences is skipped too.

Axes: n sequences in c groups of b, t positions in i query tiles of q or j key tiles of s, h = g * r query heads,
g key/value heads, k head width. In the loops u = b * g are independent products and x = r * q the queries of one key
head. Scores are [u, s, x]: the softmax reduces an axis that is not the innermost, which vectorizes on CPU, and
keys transposed once ([u, k, s]) keep every product in a form that XLA's fast CPU kernels take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.layers import scaled

ATTENTION_RESIDUALS = "attention_residuals"
"""Name of the output and log-sum-exp for `jax.checkpoint_policies.save_only_these_names`."""

_TILE_SCORES = 2**17  # scores in a CPU tile: 0.5 MiB in float32, which stays in the second-level cache
_HIDDEN = -1e30  # finite: the difference of two hidden scores is 0, not NaN


class _Options(NamedTuple):
    block: int
    group: int  # sequences that one loop handles at once
    window: int | None
    softcap: float | None
    scale: float


def blockwise_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    lengths_n: jax.Array,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    block_size: int | None = None,
) -> jax.Array:
    """Grouped-query causal attention of right-padded sequences, [n, t, h, k]; scores and softmax in float32 or wider.

    On CPU it loops over sequences, so a batch that is split over devices needs `jax.shard_map` around it.

    Args:
      block_size: queries and keys per tile; by default near 128 (256 if t > 512), such that the tiles fill t.
    """
    length = query_nthk.shape[1]
    block = tile_size(length, block_size)
    padding = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    padded = (jnp.pad(x, padding) if padding[1][1] else x for x in (query_nthk, key_ntgk, value_ntgk))
    options = _Options(block, 0, window, softcap, scale)
    return _attention(*padded, lengths_n.astype(jnp.int32), options)[:, :length]


def tile_size(length: int, block_size: int | None = None) -> int:
    """Returns the number of queries and keys per tile for sequences of this length."""
    return min(block_size, _round_up(length, 16)) if block_size else _even_block(length)


def group_size(num_sequences: int, num_heads: int, block: int) -> int:
    """Returns the number of sequences that one loop handles at once on CPU: as many as fit in the cache."""
    most = max(1, _TILE_SCORES // (num_heads * block**2))
    # A divisor of the number of sequences, so that all groups have one shape and share one loop body.
    return next(b for b in range(min(most, num_sequences), 0, -1) if num_sequences % b == 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_block(length: int) -> int:
    """Returns the block size that fills the length best: 300 positions are three tiles of 112, not of 128.

    Small tiles waste less on the diagonal and on padding, large ones less on each step.
    """
    target = 128 if length <= 512 else 256
    # The number of tiles is that of the target size; then the tiles are as small as this number allows.
    return _round_up(-(-length // -(-length // target)), 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, options: _Options) -> jax.Array:
    return _attention_forward(query, key, value, lengths, options)[0]


def _attention_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, options: _Options
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Named, so that a remat policy can keep them: without these two the backward pass repeats the whole forward loop.
    operands = (query, key, value, lengths)
    output, lse = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in _per_platform(_forward, options, *operands))
    return output, (*operands, output, lse)


def _attention_backward(options: _Options, residuals: tuple[jax.Array, ...], d_output: jax.Array) -> tuple[Any, ...]:
    lengths = residuals[3]
    gradients = _per_platform(_backward, options, *residuals, d_output)
    # Integers have no gradient, for which JAX expects this dtype.
    return *gradients, np.zeros(lengths.shape, jax.dtypes.float0)


_attention.defvjp(_attention_forward, _attention_backward)


def _per_platform(function: Callable[..., Any], options: _Options, query: jax.Array, *operands: jax.Array) -> Any:
    """Loops over groups of sequences that fit in the cache on CPU, so that short ones end early; elsewhere over all."""
    num_sequences, _, num_heads, _ = query.shape
    few = group_size(num_sequences, num_heads, options.block)
    on_cpu, elsewhere = (functools.partial(function, options._replace(group=b)) for b in (few, num_sequences))
    # Decided when the program is lowered, since it may be compiled for another platform than this process runs on.
    return lax.platform_dependent(query, *operands, cpu=on_cpu, default=elsewhere)


def _forward(
    options: _Options, query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [n, t, h, k] and the log-sum-exp of the scores [n, t, h]."""
    num_kv_heads, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)

    def group(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query_iukx, key_jusk, value_juks, length = operands

        def query_tile(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            output, lse = results
            query_ukx = query_iukx[i]
            u, k, x = query_ukx.shape
            # Running maximum, sum of weights and weighted values, all in the wide dtype until the last tile.
            state = (jnp.full((u, x), _HIDDEN, dtype), jnp.zeros((u, x), dtype), jnp.zeros((u, k, x), dtype))
            step = functools.partial(_forward_tile, options, query_ukx, key_jusk, value_juks)
            top, total, weighted = _over_key_tiles(options, i, key_jusk.shape[0], step, state)
            # Never 0 / 0: on the diagonal every query sees at least itself.
            output = _put(output, i, (weighted / total[:, None]).astype(output.dtype))
            return output, _put(lse, i, top + jnp.log(total))

        i, u, _, x = query_iukx.shape
        empty = jnp.zeros(query_iukx.shape, query.dtype), jnp.zeros((i, u, x), dtype)
        return lax.fori_loop(0, _num_tiles(length, options), query_tile, empty)

    operands = (
        # Scaling the queries is cheaper than scaling every score.
        _query_tiles(scaled(query, options.scale), num_kv_heads, options),
        _key_tiles(key, options),
        _transposed_key_tiles(value, options),
        # A group's loop runs until its longest sequence ends.
        lengths.reshape(-1, options.group).max(1),
    )
    output_ciukx, lse_ciux = lax.map(group, operands)
    return _untile_queries(output_ciukx, num_kv_heads, options), _untile_queries(
        lse_ciux[..., None, :], num_kv_heads, options
    )[..., 0]


def _forward_tile(
    options: _Options,
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
        scores = jnp.where(_visible(options, i, j, query_ukx.shape[-1]), scores, _HIDDEN)
    # Earlier sums are relative to the old maximum; `kept` converts them to the new one.
    new_top = jnp.maximum(top, scores.max(1))
    weights, kept = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
    # Weights take the values' dtype for a fast product, which still accumulates in float32 or wider.
    values = _product("uks,usx->ukx", value_juks[j], weights.astype(value_juks.dtype))
    return new_top, total * kept + weights.sum(1), weighted * kept[:, None] + values


def _backward(
    options: _Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    output: jax.Array,
    lse: jax.Array,
    d_output: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of query, key and value."""
    num_kv_heads = key.shape[2]
    # The term that the softmax's gradient subtracts: sum_k output * d_output, for each query.
    delta = jnp.sum(output.astype(lse.dtype) * d_output.astype(lse.dtype), axis=-1)

    def group(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query_iukx, d_output_iukx, lse_iux, delta_iux, key_jusk, key_juks, value_jusk, length = operands

        def query_tile(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, d_key, d_value = gradients
            of_query = (query_iukx[i], d_output_iukx[i], lse_iux[i], delta_iux[i])
            step = functools.partial(_backward_tile, options, *of_query, key_jusk, key_juks, value_jusk)
            start = (jnp.zeros(query_iukx.shape[1:], lse.dtype), d_key, d_value)
            d_query_ukx, d_key, d_value = _over_key_tiles(options, i, key_jusk.shape[0], step, start)
            return _put(d_query, i, d_query_ukx), d_key, d_value

        # Key and value gradients are sums over many query tiles, so they stay wide and are rounded once at the end.
        zeros = tuple(jnp.zeros(x.shape, lse.dtype) for x in (query_iukx, key_jusk, value_jusk))
        return lax.fori_loop(0, _num_tiles(length, options), query_tile, zeros)

    operands = (
        _query_tiles(scaled(query, options.scale), num_kv_heads, options),
        _query_tiles(d_output, num_kv_heads, options),
        *(_query_tiles(x[..., None], num_kv_heads, options)[..., 0, :] for x in (lse, delta)),
        _key_tiles(key, options),
        _transposed_key_tiles(key, options),
        _key_tiles(value, options),
        lengths.reshape(-1, options.group).max(1),
    )
    d_query, d_key, d_value = lax.map(group, operands)
    # The tiles used scaled queries: their own gradient still lacks the factor, that of the keys already has it.
    d_query = _untile_queries(d_query, num_kv_heads, options) * options.scale
    d_key, d_value = (rearrange(x, "c j (b g) s k -> (c b) (j s) g k", b=options.group) for x in (d_key, d_value))
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


def _backward_tile(
    options: _Options,
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
        weights = jnp.where(_visible(options, i, j, query_ukx.shape[-1]), weights, 0)
    d_scores = weights * (d_weights - delta_ux[:, None])
    if options.softcap is not None:
        # tanh' = 1 - tanh^2, and the capped score is softcap * tanh.
        d_scores *= 1 - jnp.square(scores / options.softcap)
    weights, d_scores = weights.astype(query_ukx.dtype), d_scores.astype(query_ukx.dtype)
    d_query += _product("uks,usx->ukx", key_juks[j], d_scores)
    d_key = _put(d_key, j, d_key[j] + _product("usx,ukx->usk", d_scores, query_ukx))
    d_value = _put(d_value, j, d_value[j] + _product("usx,ukx->usk", weights, d_output_ukx))
    return d_query, d_key, d_value


def _over_key_tiles(options: _Options, i: jax.Array, num_tiles: int, step: Callable[..., Any], state: Any) -> Any:
    """Runs step over the key tiles that query tile i sees; only those that the mask cuts through are masked.

    With a window of 2 tiles:    masked | whole | masked (diagonal)      tiles i-2, i-1, i
    """
    if num_tiles > 1:  # one tile: XLA would hoist the body of a loop that never runs, and run it
        first = whole = jnp.int32(0)
        if options.window is not None:
            # The tile with the earliest key that the first query of tile i sees.
            first = jnp.maximum(i - (options.window + options.block - 2) // options.block, 0)
            # The earliest tile that the last query of tile i sees as a whole.
            whole = jnp.clip(i + 1 - options.window // options.block, first, i)
            state = lax.fori_loop(first, whole, functools.partial(step, i, masked=True), state)
        state = lax.fori_loop(whole, i, functools.partial(step, i, masked=False), state)
    # The diagonal tile comes last, so every query has a visible score by the end.
    return step(i, i, state, masked=True)


def _visible(options: _Options, i: jax.Array, j: jax.Array, num_queries: int) -> jax.Array:
    """Returns bool [s, x]: True where the queries of tile i see the keys of tile j."""
    # x = r * q holds all query heads of a key head, so the position in the tile is x modulo the tile size.
    offset_sx = jnp.arange(num_queries)[None, :] % options.block - jnp.arange(options.block)[:, None]
    distance_sx = (i - j) * options.block + offset_sx
    visible_sx = distance_sx >= 0
    return visible_sx if options.window is None else visible_sx & (distance_sx < options.window)


def _soft_cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _put(x: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, row, index, 0)


def _num_tiles(length: jax.Array, options: _Options) -> jax.Array:
    return (length + options.block - 1) // options.block


def _query_tiles(x_nthk: jax.Array, num_kv_heads: int, options: _Options) -> jax.Array:
    sizes = {"b": options.group, "q": options.block, "g": num_kv_heads}
    return rearrange(x_nthk, "(c b) (i q) (g r) k -> c i (b g) k (r q)", **sizes)


def _untile_queries(x_ciukx: jax.Array, num_kv_heads: int, options: _Options) -> jax.Array:
    sizes = {"b": options.group, "q": options.block, "g": num_kv_heads}
    return rearrange(x_ciukx, "c i (b g) k (r q) -> (c b) (i q) (g r) k", **sizes)


def _key_tiles(x_ntgk: jax.Array, options: _Options) -> jax.Array:
    return rearrange(x_ntgk, "(c b) (j s) g k -> c j (b g) s k", b=options.group, s=options.block)


def _transposed_key_tiles(x_ntgk: jax.Array, options: _Options) -> jax.Array:
    return rearrange(x_ntgk, "(c b) (j s) g k -> c j (b g) k s", b=options.group, s=options.block)
