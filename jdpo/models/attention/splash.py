"""Splash attention: JAX's Pallas kernel for TPU, which skips fully masked tiles.

A kernel runs on one device: with several devices, call it within `jax.shard_map`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from jdpo.models.attention.blockwise import ATTENTION_RESIDUALS
from jdpo.models.layers import scaled

# Width of a TPU's vector registers, of which the kernel's tile sizes are multiples.
LANES = 128
BLOCK_SIZE = 512


def splash_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    segments_nt: jax.Array | None = None,
    *,
    sinks_h: jax.Array | None = None,
    window: int | None,
    softcap: float | None,
    scale: float,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query causal attention of right-padded rows, [n, t, h, k], on TPU.

    Lengths are not needed: with a causal mask no real query sees the padding after it. For rows of one sequence,
    segment ids would only hide real keys from padding queries, at the cost of a comparison for every score.

    Args:
      segments_nt: see `segment_starts`; None if a row holds one sequence. They mask tiles; none is skipped for them.
      sinks_h: see `jdpo.models.attention.sinks`; rounded to the queries' dtype, in which the kernel returns gradients.
      block_q, block_kv: queries and keys per tile, multiples of 128; by default at most 512. t is padded to fill both.
      interpret: emulates the kernel on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, num_heads = query_nthk.shape[1:3]
    block_q, block_kv, padded_length = tiling(length, block_q, block_kv)
    kernel = _kernel(num_heads, padded_length, window, softcap, block_q, block_kv, interpret)
    # The kernel itself does not scale the scores.
    operands = (scaled(query_nthk, scale), key_ntgk, value_ntgk)
    padding = ((0, 0), (0, padded_length - length), (0, 0), (0, 0))
    # The kernel takes one sequence, heads first: [h, t, k].
    query, key, value = (rearrange(jnp.pad(x, padding), "n t h k -> n h t k") for x in operands)
    segments, sinks_nh = None, None
    if segments_nt is not None:
        # What fills the last tile is a segment of its own.
        ids_nt = jnp.pad(segments_nt, ((0, 0), (0, padded_length - length)), constant_values=-1)
        segments = splash.SegmentIds(q=ids_nt, kv=ids_nt)
    if sinks_h is not None:
        # Repeated before they are rounded, so that the rows' gradients are summed in the sinks' own dtype.
        sinks_nh = repeat(sinks_h, "h -> n h", n=len(query)).astype(query.dtype)
    output_nhtk = jax.vmap(kernel)(query, key, value, segments, sinks_nh)
    return rearrange(output_nhtk, "n h t k -> n t h k")[:, :length]


class Tiling(NamedTuple):
    """Queries and keys per tile, and the length that both fill."""

    block_q: int
    block_kv: int
    padded_length: int


def tiling(length: int, block_q: int | None = None, block_kv: int | None = None) -> Tiling:
    """Chooses the tiling of a sequence; by default as few tiles of at most 512 as possible, each a multiple of 128.

    >>> tiling(640)
    Tiling(block_q=384, block_kv=384, padded_length=768)
    """
    tiles = -(-length // BLOCK_SIZE)
    usual = -(-length // (tiles * LANES)) * LANES
    block_q, block_kv = block_q or usual, block_kv or usual
    multiple = math.lcm(block_q, block_kv)
    return Tiling(block_q, block_kv, -(-length // multiple) * multiple)


def _kernel(
    num_heads: int,
    length: int,
    window: int | None,
    softcap: float | None,
    block_q: int,
    block_kv: int,
    interpret: bool,
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    # A window counts the query's own key, which the two sides of LocalMask do not.
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    # Two backward kernels, not the fused one: that holds a query gradient for each key tile. Compiled for v5p, it moves
    # 21 % fewer bytes with one tile, 32 % more with eight; which is faster, no TPU has shown yet.
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        # The caller's shard_map has already split heads and sequences.
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        # The name that all backends share, by which remat policies keep output and log-sum-exp.
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        interpret=interpret,
    )
