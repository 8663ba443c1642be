"""Blocks of leaves of the params on this host, as numpy sees them, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params
from jdpo.models.weights.hf_names import Piece, hf_tensors

Placed = tuple[Piece, np.ndarray]
"""A piece, and its values in the decoder's layout, not to be written."""


def hf_blocks(params: Params, config: ModelConfig) -> Iterator[tuple[str, Callable[[], list[Placed]]]]:
    """Yields every tensor of a checkpoint with what takes the values of its pieces to the host, before the next one.

    With several processes every process must run it to the end, with params of one sharding: a tensor's slices travel
    to all of them. Which of them takes it to its host, and whether that succeeds, is nothing to the others.
    """
    for name, pieces in hf_tensors(config).items():
        leaves = [_leaf(params, piece) for piece in pieces]
        if all(leaf.is_fully_addressable for leaf in leaves):
            yield name, functools.partial(_on_host, pieces, leaves)
        else:
            blocks = [_everywhere(leaf, piece.at) for piece, leaf in zip(pieces, leaves, strict=True)]
            yield name, functools.partial(_from_all, pieces, blocks)


def _on_host(pieces: Sequence[Piece], leaves: Sequence[jax.Array]) -> list[Placed]:
    return [(piece, _local(leaf, piece)) for piece, leaf in zip(pieces, leaves, strict=True)]


def _from_all(pieces: Sequence[Piece], blocks: Sequence[jax.Array]) -> list[Placed]:
    return [(piece, np.asarray(block.addressable_data(0))) for piece, block in zip(pieces, blocks, strict=True)]


def _leaf(params: Any, piece: Piece) -> jax.Array:
    for key in piece.path:
        params = params[key]
    assert isinstance(params, jax.Array), piece
    assert params.shape[len(piece.at) :] == piece.window.shape, (piece, params.shape)
    return params


def _local(leaf: jax.Array, piece: Piece) -> np.ndarray:
    """A block whose shards all stand on devices of this process."""
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if all(shard.device.platform == "cpu" for shard in shards):
        if len(shards) == 1:
            return np.asarray(shards[0].data)[piece.at]  # the array's own memory
        at = piece.at
    else:
        # A new array: one that gave its values to the host once keeps them there, and so would params.
        sharding = _without_leading(leaf.sharding, len(piece.at))
        leaf, at = _block_getter(sharding)(leaf, piece.at), ()
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    block = np.empty(piece.window.shape, leaf.dtype)
    for shard in shards:
        index = tuple(part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True))
        leading, inner = index[: len(at)], index[len(at) :]
        if all(low <= i < high for i, (low, high) in zip(at, leading, strict=True)):
            inside = tuple(i - low for i, (low, _) in zip(at, leading, strict=True))
            block[tuple(slice(*bounds) for bounds in inner)] = np.asarray(shard.data)[inside]
    return block


def _everywhere(leaf: jax.Array, at: tuple[int, ...]) -> jax.Array:
    """A block, whole on every device of every process."""
    assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
    return _block_getter(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf, at)


@functools.lru_cache(maxsize=64)
def _block_getter(sharding: Sharding) -> Callable[..., jax.Array]:
    def get(leaf: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        return leaf[at] if at else jnp.copy(leaf)

    return jax.jit(get, out_shardings=sharding)


def _without_leading(sharding: Sharding, count: int) -> Sharding:
    """The sharding of a block of a leaf; leading axes that are split are made whole for it."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[count:]), memory_kind=sharding.memory_kind)
    assert isinstance(sharding, SingleDeviceSharding), sharding
    return sharding
