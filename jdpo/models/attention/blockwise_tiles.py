"""The tiles of blockwise attention: their sizes, which of them a loop visits, and how arrays are cut into them.

Axes: see `jdpo.models.attention.blockwise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import lax

_TILE_SCORES = 2**17  # scores in a CPU tile: 0.5 MiB in float32, which stays in the second-level cache


class TileOptions(NamedTuple):
    """Static settings of the loops."""

    block: int
    group: int  # rows that one loop handles at once
    window: int | None
    softcap: float | None
    scale: float


class TileRows(NamedTuple):
    """What the loops need to know about rows: [n, ...], or of one group without that axis.

    Attributes:
      length: int32, real places; of a group, those of its longest row.
      first, whole: int32 [i], the key tile with the earliest key that a query of tile i may see, and the earliest tile
        that all its queries see as a whole; of a group, for all its rows.
      lowest: int32 [i, q], or [i, b, q] of a group, the earliest key that each query sees.
        The last three are None where every row is one sequence.
    """

    length: jax.Array
    first: jax.Array | None = None
    whole: jax.Array | None = None
    lowest: jax.Array | None = None


def tile_rows(lengths_n: jax.Array, segments_nt: jax.Array | None, window: int | None, block: int) -> TileRows:
    """Computes the bounds of the loops from the segments of the rows; None if a row holds one sequence."""
    if segments_nt is None:
        return TileRows(lengths_n)
    num_places = segments_nt.shape[1]
    lowest_nt = lowest_keys(segments_nt, window)
    # Later queries see later keys, so the first and the last real query of a tile decide.
    last_ni = jnp.minimum(jnp.arange(block - 1, num_places + block - 1, block), lengths_n[:, None] - 1)
    last_lowest_ni = jnp.take_along_axis(lowest_nt, jnp.maximum(last_ni, 0), 1)
    lowest_niq = jnp.pad(lowest_nt, ((0, 0), (0, -num_places % block)), mode="edge")
    return TileRows(
        lengths_n,
        lowest_nt[:, ::block] // block,
        (last_lowest_ni + block - 1) // block,
        rearrange(lowest_niq, "n (i q) -> n i q", q=block),
    )


def lowest_keys(segments_nt: Any, window: int | None) -> Any:
    """Returns int [n, t], the place of the earliest key that each query sees; of numpy or JAX arrays.

    >>> lowest_keys(np.array([[0, 0, 0, 3, 3]]), 2).tolist()
    [[0, 0, 1, 3, 3]]
    """
    if window is None:
        return segments_nt
    xp = jnp if isinstance(segments_nt, jax.Array) else np
    return xp.maximum(segments_nt, np.arange(1 - window, segments_nt.shape[1] - window + 1, dtype=np.int32))


def tile_size(length: int, block_size: int | None = None, *, packed: bool = False, window: int | None = None) -> int:
    """Returns the number of queries and keys per tile, for rows of this length.

    Args:
      window: number of tokens that a query sees. Tiles much larger than it would be mostly hidden.
      packed: True if a row may hold several sequences. Their starts cut through tiles, so small ones waste less.

    >>> tile_size(2048), tile_size(2048, window=100)
    (256, 112)
    """
    if packed and not block_size:
        block_size = 48 if length <= 512 else 64  # measured: benchmarks/results/2026-11-30-attention-segments.md
    return min(block_size, _round_up(length, 16)) if block_size else _even_block(length, window)


def group_size(num_rows: int, num_heads: int, block: int, *, packed: bool = False) -> int:
    """Returns the number of rows that one loop handles at once on CPU: as many as fit in the cache.

    Args:
      packed: True if a row may hold several sequences. Theirs start at different places, and a group computes every
        tile that one of its rows needs, so each row gets a loop of its own.
    """
    most = 1 if packed else max(1, _TILE_SCORES // (num_heads * block**2))
    # A divisor of the number of rows, so that all groups have one shape and share one loop body.
    return next(b for b in range(min(most, num_rows), 0, -1) if num_rows % b == 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_block(length: int, window: int | None) -> int:
    """Returns the block size that fills the length best: 300 positions are three tiles of 112, not of 128.

    Small tiles waste less on the diagonal and on padding, large ones less on each step.
    """
    target = 128 if length <= 512 else 256
    if window is not None:
        # With tiles as large as the window, a query's keys are in two of them; small tiles cost more in steps.
        target = min(target, max(64, _round_up(window, 16)))
    # The number of tiles is that of the target size; then the tiles are as small as this number allows.
    return _round_up(-(-length // -(-length // target)), 16)


def grouped_rows(rows: TileRows, options: TileOptions) -> TileRows:
    """Returns what holds for all rows of each group, [c, ...]."""

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(-1, options.group, *x.shape[1:])

    # A group's loop runs until its longest row ends.
    length = grouped(rows.length).max(1)
    if rows.first is None or rows.whole is None or rows.lowest is None:
        return TileRows(length)
    lowest = rearrange(rows.lowest, "(c b) i q -> c i b q", b=options.group)
    return TileRows(length, grouped(rows.first).min(1), grouped(rows.whole).max(1), lowest)


def over_key_tiles(
    options: TileOptions, rows: TileRows, i: jax.Array, num_tiles: int, step: Callable[..., Any], state: Any
) -> Any:
    """Runs step over the key tiles that query tile i sees; only those that the mask cuts through are masked.

    With a window of 2 tiles:    masked | whole | masked (diagonal)      tiles i-2, i-1, i
    """
    if num_tiles > 1:  # one tile: XLA would hoist the body of a loop that never runs, and run it
        first = whole = jnp.int32(0)
        if rows.first is not None and rows.whole is not None:
            first, whole = rows.first[i], jnp.clip(rows.whole[i], rows.first[i], i)
        elif options.window is not None:
            # The tile with the earliest key that the first query of tile i sees.
            first = jnp.maximum(i - (options.window + options.block - 2) // options.block, 0)
            # The earliest tile that the last query of tile i sees as a whole.
            whole = jnp.clip(i + 1 - options.window // options.block, first, i)
        if rows.first is not None or options.window is not None:
            state = lax.fori_loop(first, whole, functools.partial(step, i, masked=True), state)
        state = lax.fori_loop(whole, i, functools.partial(step, i, masked=False), state)
    # The diagonal tile comes last, so every query has a visible score by the end.
    return step(i, i, state, masked=True)


def visible_in_tile(
    options: TileOptions, rows: TileRows, i: jax.Array, j: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Returns bool [s, x] or [u, s, x]: True where the queries of tile i, [u, k, x], see the keys of tile j."""
    num_products, _, num_queries = shape
    # x = r * q holds all query heads of a key head, so the position in the tile is x modulo the tile size.
    offset_sx = jnp.arange(num_queries)[None, :] % options.block - jnp.arange(options.block)[:, None]
    distance_sx = (i - j) * options.block + offset_sx
    visible_sx = distance_sx >= 0
    if rows.lowest is None:
        return visible_sx if options.window is None else visible_sx & (distance_sx < options.window)
    lowest_bx = jnp.tile(rows.lowest[i], (1, num_queries // options.block))
    key_s = j * options.block + jnp.arange(options.block)
    visible_bsx = visible_sx & (key_s[:, None] >= lowest_bx[:, None])
    # The key heads of a row see the same; one row's are broadcast.
    return visible_bsx if options.group == 1 else jnp.repeat(visible_bsx, num_products // options.group, 0)


def num_query_tiles(length: jax.Array, options: TileOptions) -> jax.Array:
    """Returns the number of tiles with real places."""
    return (length + options.block - 1) // options.block


def query_tiles(x_nthk: jax.Array, num_kv_heads: int, options: TileOptions) -> jax.Array:
    """Cuts queries into tiles [c, i, u, k, x]."""
    sizes = {"b": options.group, "q": options.block, "g": num_kv_heads}
    return rearrange(x_nthk, "(c b) (i q) (g r) k -> c i (b g) k (r q)", **sizes)


def untile_queries(x_ciukx: jax.Array, num_kv_heads: int, options: TileOptions) -> jax.Array:
    """Inverts `query_tiles`."""
    sizes = {"b": options.group, "q": options.block, "g": num_kv_heads}
    return rearrange(x_ciukx, "c i (b g) k (r q) -> (c b) (i q) (g r) k", **sizes)


def sink_tiles(sinks_h: jax.Array, num_kv_heads: int, options: TileOptions) -> jax.Array:
    """Returns the sink of each query of a tile, [u, x]; it is that of its head."""
    return repeat(sinks_h, "(g r) -> (b g) (r q)", g=num_kv_heads, b=options.group, q=options.block)


def key_tiles(x_ntgk: jax.Array, options: TileOptions) -> jax.Array:
    """Cuts keys or values into tiles [c, j, u, s, k]."""
    return rearrange(x_ntgk, "(c b) (j s) g k -> c j (b g) s k", b=options.group, s=options.block)


def transposed_key_tiles(x_ntgk: jax.Array, options: TileOptions) -> jax.Array:
    """Cuts keys or values into tiles [c, j, u, k, s]."""
    return rearrange(x_ntgk, "(c b) (j s) g k -> c j (b g) k s", b=options.group, s=options.block)
