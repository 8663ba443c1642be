"""Counts the work of attention backends: pairs of a query and a key, and matrix products over them.

A product over one pair of one head is 2 * head_dim FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jdpo.models.attention import blockwise_tiles, splash
from jdpo.models.attention.segments import segment_starts

_CUDNN_TILE = 128  # for its Hopper kernels; others differ


class Products(NamedTuple):
    """Matrix products over each computed pair.

    Attributes:
      forward: the scores, and the weighted values.
      backward: the four gradients, and the products that are computed again for them.
      repeated: forward products that run again although output and log-sum-exp are kept.
    """

    forward: int
    backward: int
    repeated: int


PRODUCTS = {
    "xla": Products(2, 4, 1),  # keeps the weights; if only its output is kept, the scores are computed again
    "blockwise": Products(2, 5, 0),  # its backward pass computes the scores again
    "cudnn": Products(2, 5, 0),
    "splash": Products(2, 7, 0),  # two backward kernels, each with the scores and their gradient
}


def causal_pairs(positions: np.ndarray, window: int | None) -> int:
    """Returns the pairs that causal attention needs: queries at `positions` int [...] with all keys that they see.

    >>> causal_pairs(np.arange(4), None), causal_pairs(np.arange(4), 2)
    (10, 7)
    """
    seen = positions.astype(np.int64) + 1
    return int((seen if window is None else np.minimum(seen, window)).sum())


def computed_pairs(
    backend: str,
    lengths: np.ndarray,
    length: int,
    *,
    num_heads: int,
    window: int | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    on_cpu: bool = True,
) -> int:
    """Returns the pairs whose scores each head computes, over all rows of one call on one device.

    Args:
      lengths: int [n] or [n, u], as for `causal_attention`.
      length: t.
      on_cpu: True on CPU, where blockwise attention handles few rows at once.
    """
    packed = lengths.ndim == 2 and lengths.shape[1] > 1
    if not packed:
        lengths = lengths.reshape(-1)
    if backend == "xla":
        return len(lengths) * length**2
    if backend == "splash":
        block_q, block_kv, padded_length = splash.tiling(length, block_q, block_kv)
        return len(lengths) * _tiled_pairs(padded_length // block_q, block_q, block_kv, window)
    if backend == "cudnn":
        # Each sequence stops at its own length.
        tiles, group, block = -(-lengths.reshape(-1) // _CUDNN_TILE), 1, _CUDNN_TILE
    else:
        block = blockwise_tiles.tile_size(length, block_q or block_kv, packed=packed, window=window)
        group = blockwise_tiles.group_size(len(lengths), num_heads, block, packed=packed) if on_cpu else len(lengths)
        if packed:
            return _segmented_pairs(lengths, length, block, group, window)
        # A group stops at the length of its longest row.
        tiles = -(-lengths.reshape(-1, group).max(1) // block)
    # Many sequences have the same number of tiles, so each number is counted once.
    numbers, counts = np.unique(tiles, return_counts=True)
    of_number = (_tiled_pairs(int(number), block, block, window) for number in numbers)
    return sum(int(count) * group * pairs for count, pairs in zip(counts, of_number, strict=True))


def _segmented_pairs(lengths: np.ndarray, length: int, block: int, group: int, window: int | None) -> int:
    """Returns the pairs in the tiles that blockwise attention computes for rows of several sequences.

    >>> _segmented_pairs(np.array([[4, 4]]), 16, 4, 1, None), _segmented_pairs(np.array([[3, 4, 1]]), 16, 4, 1, None)
    (32, 48)
    """
    first_ni = blockwise_tiles.lowest_keys(segment_starts(lengths, length), window)[:, ::block] // block
    # A group computes what one of its rows needs.
    first_ci, last_c = first_ni.reshape(-1, group, first_ni.shape[1]).min(1), lengths.sum(1).reshape(-1, group).max(1)
    tile_i = np.arange(first_ni.shape[1])
    key_tiles_ci = np.where(tile_i * block < last_c[:, None], tile_i - first_ci + 1, 0)
    return int(key_tiles_ci.sum()) * group * block**2


def _tiled_pairs(num_query_tiles: int, block_q: int, block_kv: int, window: int | None) -> int:
    """Returns the pairs in the tiles of one sequence that are not fully masked.

    >>> _tiled_pairs(3, 2, 2, None), _tiled_pairs(3, 2, 2, 2)
    (24, 20)
    """
    tile = np.arange(num_query_tiles)
    last = ((tile + 1) * block_q - 1) // block_kv
    first = 0 if window is None else np.maximum(tile * block_q - window + 1, 0) // block_kv
    return int((last - first + 1).sum()) * block_q * block_kv
