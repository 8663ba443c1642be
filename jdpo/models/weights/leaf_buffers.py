"""Host memory in which the shards of a leaf are put together before they are one jax.Array.

On a CPU that memory is the array's own: nothing is copied, and a training step may take it over (donate it). For other
devices it is a buffer that is handed to them; a stacked leaf may go there some layers at a time.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

Bounds = tuple[tuple[int, int], ...]
"""(first, last + 1) along every axis."""


class Block(NamedTuple):
    """Some rows along the first axis of a leaf, or all of them.

    Attributes:
      rows: first and last + 1 along the leaf's first axis; None: all of the leaf, which may be a scalar.
      shape: of the block.
    """

    rows: tuple[int, int] | None
    shape: tuple[int, ...]

    def num_bytes(self, dtype: np.dtype) -> int:
        """Of its elements."""
        return math.prod(self.shape) * dtype.itemsize


def blocks_of(
    shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype, max_bytes: int | None, *, divisible: bool
) -> Iterator[Block]:
    """A leaf in blocks of at most max_bytes (or one row) each; None: as one.

    Args:
      divisible: whether the leaf may be divided along its first axis, where the sharding leaves that whole.
    """
    whole = Block(None, shape)
    if (
        max_bytes is None
        or not divisible
        or whole.num_bytes(dtype) <= max_bytes
        or sharding.shard_shape(shape)[0] != shape[0]
    ):
        yield whole
        return
    at_once = max(1, max_bytes // Block(None, shape[1:]).num_bytes(dtype))
    for first in range(0, shape[0], at_once):
        last = min(first + at_once, shape[0])
        yield Block((first, last), (last - first, *shape[1:]))


class LeafBuffers:
    """The memory of one block.

    Attributes:
      parts: where each shard of this process begins and ends in the block -> arrays of zeros, to be filled alike.
    """

    def __init__(self, block: Block, sharding: Sharding, dtype: np.dtype, *, in_place: bool) -> None:
        self._block, self._sharding, self._in_place = block, sharding, in_place
        self.parts: dict[Bounds, list[np.ndarray]] = {}
        self._shards: list[jax.Array] = []
        self._staged: list[tuple[SingleDeviceSharding, np.ndarray]] = []
        for device, index in sharding.addressable_devices_indices_map(block.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), block.shape, strict=True))
            arrays = self.parts.setdefault(bounds, [])
            place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            shape = tuple(last - first for first, last in bounds)
            if in_place:
                self._shards.append(jax.device_put(_zeros_to_copy(shape, dtype), place))
                arrays.append(_memory_of(self._shards[-1]))
            elif not arrays:
                arrays.append(np.zeros(shape, dtype))
            self._staged.append((place, arrays[0]))

    def finish(self) -> jax.Array:
        """The block on its devices, once its memory is filled; it must not be written any more."""
        shards = self._shards or [jax.device_put(array, place) for place, array in self._staged]
        array = jax.make_array_from_single_device_arrays(self._block.shape, self._sharding, shards)
        self.parts, self._staged, self._shards = {}, [], []
        return jax.block_until_ready(array)


def placed(stacked: jax.Array | None, block: Block, filled: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Puts a filled block to its rows of a leaf of a shape; the first one makes the leaf."""
    if block.rows is None:
        return filled
    if stacked is None:
        make = jax.jit(functools.partial(jnp.zeros, shape, filled.dtype), out_shardings=filled.sharding)
        stacked = make()
    return jax.block_until_ready(_writer(filled.sharding)(stacked, filled, block.rows[0]))


@functools.lru_cache(maxsize=64)
def _writer(sharding: Sharding) -> Callable[..., jax.Array]:
    def write(stacked: jax.Array, block: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stacked, block, first, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _zeros_to_copy(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that no jax.Array can share, so that it makes memory of its own: only that can be donated.

    Arrays on a CPU share memory that is aligned to 64 bytes, whatever `may_alias` says.
    """
    run = np.zeros(math.prod(shape) + 1, dtype)
    first = int(run.ctypes.data % 64 == 0)
    return run[first : first + math.prod(shape)].reshape(shape)


def _memory_of(shard: jax.Array) -> np.ndarray:
    """The memory of an array that was just made on a CPU and that nobody else has seen, to be written."""
    jax.block_until_ready(shard)
    if not shard.size:
        return np.zeros(shard.shape, shard.dtype)
    memory = (ctypes.c_uint8 * shard.nbytes).from_address(shard.unsafe_buffer_pointer())
    return np.frombuffer(memory, np.uint8).view(shard.dtype).reshape(shard.shape)
