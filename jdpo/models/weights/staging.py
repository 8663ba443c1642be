"""Fills leaves of the params from the tensors of a model's files, by way of a little host memory.

A leaf is filled slab by slab: threads read a slab into host memory in the decoder's layout while the slab before it
moves to the devices, where it is written into the leaf, which is donated. So no leaf is held twice, on any platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jdpo.models.families.layouts import Path
from jdpo.models.weights.casting import PADDING_BYTES, Scratch, all_finite, copy_cast, is_narrower
from jdpo.models.weights.hf_names import Piece
from jdpo.models.weights.safetensors_folder import TensorFiles
from jdpo.models.weights.strided_views import StridedView

CHUNK_BYTES = 2**21
"""Bytes that a thread reads at once: enough for a disk, few enough to stay in a core's cache."""

SLAB_BYTES = 2**25
"""Bytes of a slab, of which two are in host memory at a time. A slab holds one layer at least, however large."""

_MAX_LISTED = 10

Bounds = tuple[tuple[int, int], ...]
"""(first, last + 1) along every axis."""


class Leaf(NamedTuple):
    """A leaf of the params that is to be filled; `pieces` as in `hf_names.leaves`."""

    path: Path
    shape: tuple[int, ...]
    pieces: list[Piece]
    sharding: Sharding
    dtype: np.dtype


class _Slab(NamedTuple):
    """A part of a leaf on its way to the devices.

    Attributes:
      bounds: the part, in the leaf.
      axis: the axis along which the leaf is cut into slabs; None if the slab is the whole leaf.
      box: the smallest part of the slab that holds all shards of this process, in the slab.
      values: the box in host memory, once all of `reads` are done.
    """

    leaf: Leaf
    bounds: Bounds
    axis: int | None
    box: Bounds
    values: np.ndarray
    reads: list[Future[None]]


def filled_leaves(
    leaves: Sequence[Leaf], files: TensorFiles, pool: ThreadPoolExecutor, slab_bytes: int
) -> Iterator[tuple[Path, jax.Array]]:
    """Yields (path, leaf on its devices) for every leaf.

    Raises:
      ValueError: a file cannot be read or is too short; a tensor holds NaN, Inf or values that the dtype cannot hold.
    """
    reader = Reader(files, pool)
    partial: jax.Array | None = None

    def move(slab: _Slab) -> Iterator[tuple[Path, jax.Array]]:
        nonlocal partial
        for read in slab.reads:
            read.result()
        if reader.faults:
            raise ValueError("\n".join(list(reader.faults.values())[:_MAX_LISTED]))
        # The host memory is used again for the slab after the next, so the devices must be done with it.
        partial = jax.block_until_ready(_moved(slab, partial))
        if slab.axis is None or slab.bounds[slab.axis][1] == slab.leaf.shape[slab.axis]:
            leaf, partial = partial, None
            yield slab.leaf.path, leaf

    waiting: _Slab | None = None
    for leaf in leaves:
        axis, all_bounds = _slabs(leaf, slab_bytes)
        for bounds in all_bounds:
            # Threads read this slab while the one before it moves to the devices.
            following = reader.start(leaf, bounds, axis)
            if waiting is not None:
                yield from move(waiting)
            waiting = following
    if waiting is not None:
        yield from move(waiting)


def _slabs(leaf: Leaf, slab_bytes: int) -> tuple[int | None, list[Bounds]]:
    """Cuts a leaf along its stacked axis, or the axis that is outermost in the file, unless it is sharded there."""
    whole = tuple((0, size) for size in leaf.shape)
    num_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    if num_bytes <= slab_bytes:
        return None, [whole]
    strides = leaf.pieces[0].view.strides
    axis = 0 if leaf.pieces[0].at else strides.index(max(strides))
    size = leaf.shape[axis]
    # A slab along a sharded axis would belong to some of the devices only.
    if leaf.sharding.shard_shape(leaf.shape)[axis] != size:
        return None, [whole]
    # Equal slabs, so that one program writes all of them: the last one repeats some rows of the one before it.
    num_slabs = -(-size // max(1, slab_bytes * size // num_bytes))
    step = -(-size // num_slabs)
    parts = [(min(first, size - step), min(first, size - step) + step) for first in range(0, size, step)]
    return axis, [(*whole[:axis], part, *whole[axis + 1 :]) for part in parts]


class Reader:
    """Reads slabs into host memory with a pool of threads.

    Attributes:
      faults: tensor name -> what is wrong with it, as found so far.
    """

    def __init__(self, files: TensorFiles, pool: ThreadPoolExecutor) -> None:
        self.faults: dict[str, str] = {}
        self._files, self._pool = files, pool
        self._scratch = Scratch()
        self._num_slabs = 0

    def start(self, leaf: Leaf, bounds: Bounds, axis: int | None) -> _Slab:
        """Starts to read a slab into the host memory of the slab before the last."""
        # One read serves all shards of this process: neighbours often interleave in the file.
        shards = _shard_bounds(leaf.sharding, _shape(bounds)).values()
        box = tuple((min(a for a, _ in part), max(b for _, b in part)) for part in zip(*shards, strict=True))
        dtype = leaf.dtype if axis is None else self._staging_dtype(leaf)
        self._num_slabs += 1
        # Two buffers in turn: one is filled while the other moves to the devices.
        memory = self._scratch.array(f"slab {self._num_slabs % 2}", math.prod(_shape(box)), dtype)
        values = memory.reshape(_shape(box))
        in_leaf = tuple((a + low, b + low) for (a, b), (low, _) in zip(box, bounds, strict=True))
        return _Slab(leaf, bounds, axis, box, values, self.read(leaf.pieces, in_leaf, values))

    def _staging_dtype(self, leaf: Leaf) -> np.dtype:
        """The files' dtype where it is the narrower one: then less travels, and the devices cast."""
        dtypes = {self._files.dtype(piece.hf_name) for piece in leaf.pieces}
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        return narrowest if len(dtypes) == 1 and narrowest.itemsize < leaf.dtype.itemsize else leaf.dtype

    def read(self, pieces: Sequence[Piece], box: Bounds, values: np.ndarray) -> list[Future[None]]:
        """Starts to read the part `box` of the leaf that these pieces fill into `values`, an array of its shape."""
        reads = []
        for piece in pieces:
            leading, inner = box[: len(piece.at)], box[len(piece.at) :]
            if not all(low <= i < high for i, (low, high) in zip(piece.at, leading, strict=True)):
                continue
            index = tuple(i - low for i, (low, _) in zip(piece.at, leading, strict=True))
            max_elements = CHUNK_BYTES // self._files.dtype(piece.hf_name).itemsize
            for part, view in piece.view.cut(inner).chunks(max_elements):
                # The ellipsis makes the chunk of a scalar an array, which can be written.
                where: tuple[Any, ...] = (*index, *(slice(*bounds) for bounds in part), ...)
                chunk = values[where]
                reads.append(self._pool.submit(self._read_chunk, piece.hf_name, view, chunk))
        return reads

    def _read_chunk(self, name: str, view: StridedView, chunk: np.ndarray) -> None:
        run = self._scratch.array("run", view.span, self._files.dtype(name))
        try:
            self._files.read_into(name, view.start, run)
        except ValueError as error:
            self.faults[name] = str(error)
            return
        # Checked here, where the chunk is in the cache and its tensor is known.
        if not all_finite(run):
            self.faults[name] = f"{self._files.place(name)} holds NaN or Inf: the model is damaged, take another copy"
            return
        copy_cast(self._laid_out(run, view), chunk)
        if is_narrower(chunk.dtype, run.dtype) and not all_finite(chunk):
            self.faults[name] = f"{self._files.place(name)} holds values that {chunk.dtype.name} cannot"

    def _laid_out(self, run: np.ndarray, view: StridedView) -> np.ndarray:
        """Returns the view over its run; a transposed one over a copy with padded rows."""
        pitch = max(view.strides[-1], 1) if view.strides else 1
        if pitch == 1 or any(stride > pitch and stride % pitch for stride in view.strides):
            return view.array(run, view.start)
        # Reading along columns is several times faster if rows do not start whole kilobytes apart.
        wide = pitch + PADDING_BYTES // run.itemsize
        whole, rest = divmod(run.size, pitch)
        padded = self._scratch.array("padded", (whole + 1) * wide, run.dtype).reshape(-1, wide)
        padded[:whole, :pitch] = run[: whole * pitch].reshape(whole, pitch)
        padded[whole, :rest] = run[whole * pitch :]
        strides = tuple(stride if stride < pitch else stride // pitch * wide for stride in view.strides)
        return StridedView(0, view.shape, strides).array(padded.reshape(-1))


def _moved(slab: _Slab, partial: jax.Array | None) -> jax.Array:
    """Returns the leaf as far as it is filled, this slab included.

    Args:
      partial: the leaf with the slabs before this one, which is donated; None for the first.
    """
    leaf, shape = slab.leaf, _shape(slab.bounds)
    shards = []
    for device, bounds in _shard_bounds(leaf.sharding, shape).items():
        index = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, slab.box, strict=True))
        place = SingleDeviceSharding(device, memory_kind=leaf.sharding.memory_kind)
        shard = jax.device_put(slab.values[index], place)
        # On a CPU the shard may be the host memory itself, which is used again and cannot be donated, whatever
        # `may_alias` says of a numpy array. Of a jax.Array it is obeyed.
        shards.append(shard if slab.axis is not None else jax.device_put(shard, place, may_alias=False))
    array = jax.make_array_from_single_device_arrays(shape, leaf.sharding, shards)
    if slab.axis is None:
        return array
    if partial is None:
        partial = _zeros_maker(leaf.sharding)(leaf.shape, leaf.dtype)
    return _writer(leaf.sharding, slab.axis)(partial, array, slab.bounds[slab.axis][0])


@functools.lru_cache(maxsize=64)
def _zeros_maker(sharding: Sharding) -> Callable[..., jax.Array]:
    # Compiled, so that each device makes its own shard and nothing travels.
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _writer(sharding: Sharding, axis: int) -> Callable[..., jax.Array]:
    def write(leaf: jax.Array, slab: jax.Array, first: jax.Array) -> jax.Array:
        # As integers: XLA copies bfloat16 on a CPU six times slower than uint16.
        bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        integers, new = (jax.lax.bitcast_convert_type(x, bits) for x in (leaf, slab.astype(leaf.dtype)))
        written = jax.lax.dynamic_update_slice_in_dim(integers, new, first, axis)
        return jax.lax.bitcast_convert_type(written, leaf.dtype)

    # Donated, so that the slab is written into the leaf in place.
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _shard_bounds(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Bounds]:
    """Returns the bounds of the shards of this process in an array of a shape."""
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _shape(bounds: Bounds) -> tuple[int, ...]:
    return tuple(high - low for low, high in bounds)
