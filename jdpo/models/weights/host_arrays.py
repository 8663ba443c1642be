"""Brings the params to the host, one checkpoint tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jdpo.models.families.layouts import Layout
from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params
from jdpo.models.weights.hf_names import Piece, hf_tensors

HostPiece = tuple[Piece, np.ndarray]
"""A piece and its values in the decoder's layout, which must not be written."""


def host_tensors(
    params: Params, config: ModelConfig, layout: Layout | None = None
) -> Iterator[tuple[str, Callable[[], list[HostPiece]]]]:
    """Yields the name of every checkpoint tensor with a function that takes its pieces to the host.

    The function must be called before the next tensor is asked for. With several processes every process must exhaust
    the iterator, with params of the same sharding, since slices of a tensor travel between them. Whether a process
    calls the function, and whether that succeeds, does not affect the others.

    Args:
      layout: the tensors of one folder, see `layout_in`; None for those of the model.
    """
    for name, pieces in hf_tensors(config, layout).items():
        leaves = [_leaf(params, piece) for piece in pieces]
        if all(leaf.is_fully_addressable for leaf in leaves):
            yield name, functools.partial(_on_host, pieces, leaves)
        else:
            # Gathered now, not in the function: all processes must take part, but not every one calls it.
            gathered = [_everywhere(leaf, piece.at) for piece, leaf in zip(pieces, leaves, strict=True)]
            yield name, functools.partial(_from_all, pieces, gathered)


def _on_host(pieces: Sequence[Piece], leaves: Sequence[jax.Array]) -> list[HostPiece]:
    return [(piece, _local(leaf, piece)) for piece, leaf in zip(pieces, leaves, strict=True)]


def _from_all(pieces: Sequence[Piece], gathered: Sequence[jax.Array]) -> list[HostPiece]:
    # Replicated, so any shard is the whole.
    return [(piece, np.asarray(part.addressable_data(0))) for piece, part in zip(pieces, gathered, strict=True)]


def _leaf(params: Any, piece: Piece) -> jax.Array:
    for key in piece.path:
        params = params[key]
    assert isinstance(params, jax.Array), piece
    assert params.shape[len(piece.at) :] == piece.view.shape, (piece, params.shape)
    return params


def _local(leaf: jax.Array, piece: Piece) -> np.ndarray:
    """Returns a piece of a leaf whose shards are all on devices of this process."""
    # One copy of each part is enough; replicas hold the same values.
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if any(shard.device.platform != "cpu" for shard in shards):
        # A new array is made since jax keeps a host copy of every array that numpy has read.
        return np.asarray(_part_getter(_without_leading(leaf.sharding, len(piece.at)))(leaf, piece.at))
    if len(shards) == 1:
        return np.asarray(shards[0].data)[piece.at]  # the array's own memory
    # Assembled by numpy, without compiling a program for every shape.
    values = np.empty(piece.view.shape, leaf.dtype)
    for shard in shards:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True))
        leading, inner = bounds[: len(piece.at)], bounds[len(piece.at) :]
        if all(low <= i < high for i, (low, high) in zip(piece.at, leading, strict=True)):
            inside = tuple(i - low for i, (low, _) in zip(piece.at, leading, strict=True))
            values[tuple(slice(*part) for part in inner)] = np.asarray(shard.data)[inside]
    return values


def _everywhere(leaf: jax.Array, at: tuple[int, ...]) -> jax.Array:
    """Returns a part of a leaf, replicated on every device of every process."""
    assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
    return _part_getter(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf, at)


@functools.lru_cache(maxsize=64)
def _part_getter(sharding: Sharding) -> Callable[..., jax.Array]:
    def get(leaf: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        return leaf[at] if at else jnp.copy(leaf)

    return jax.jit(get, out_shardings=sharding)


def _without_leading(sharding: Sharding, count: int) -> Sharding:
    """Returns the sharding of a leaf without its leading axes."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[count:]), memory_kind=sharding.memory_kind)
    assert isinstance(sharding, SingleDeviceSharding), sharding
    return sharding
