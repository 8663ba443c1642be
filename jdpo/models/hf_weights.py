"""Safetensors <-> params, tensor by tensor: host memory holds no second copy of the model in either direction.

Loading reads, for every device of this process, the slices that stand on it; writing gathers one tensor at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jdpo.models.config import ModelConfig, layer_pattern
from jdpo.models.hf_names import EMBEDDING, HEAD, Tensor, axis_sizes, checkpoint_tensors, is_ignorable, split_axes
from jdpo.models.resize import resize_embeddings
from jdpo.models.safetensors_folder import DTYPES, TensorEntry, source_dtypes, tensor_entries
from jdpo.models.transformer import Params, Transformer

__all__ = ["iter_hf_tensors", "load_params", "resize_embeddings", "source_dtypes"]

_MAX_LISTED = 10
_COMPARED_ROWS = 4096

Index = tuple[slice, ...]


def load_params(
    folder: Path, model: Transformer | ModelConfig, shardings: Any = None, *, dtype: Any = jnp.float32
) -> Params:
    """Reads a Hugging Face folder into the params tree of `model`, each tensor straight to its shard.

    Args:
      folder: config.json beside model.safetensors, or beside shards and their index.
      shardings: a tree of jax.sharding.Sharding shaped like `abstract_params(model)`; None means one device.
      dtype: of the parameters, whatever the files hold.

    Raises:
      ValueError: a file missing, truncated or a git-LFS pointer; a tensor missing, unknown, of another shape or a
        quantized dtype, holding NaN or Inf. Tensor and file are named; all but NaN and Inf come before any read.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    entries = tensor_entries(folder)
    check_tensors(folder, entries, config)
    params: Params = {}
    with ExitStack() as stack:
        reader = _Reader(stack, entries)
        if config.tie_embeddings and HEAD.hf_name in entries:
            _require_tied(reader, folder)
        for tensor in checkpoint_tensors(config):
            sharding = _get(shardings, tensor.path) if shardings is not None else _one_device()
            parent = params
            for key in tensor.path[:-1]:
                parent = parent.setdefault(key, {})
            stacked = parent.get(tensor.path[-1])
            parent[tensor.path[-1]] = _place(reader, tensor, config, sharding, np.dtype(dtype), stacked)
    return params


def check_tensors(folder: Path, entries: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Holds the tensors of a folder against those the model needs; one ValueError lists all that is wrong."""
    expected = {tensor.hf_name: tensor.hf_shape for tensor in checkpoint_tensors(config)}
    allowed = {HEAD.hf_name} if config.tie_embeddings else set()
    problems = [
        f"missing tensor {name}, expected shape {shape}" for name, shape in expected.items() if name not in entries
    ]
    for name, entry in entries.items():
        where = f"{name} in {entry.file.name}"
        if name in expected and entry.shape != expected[name]:
            problems.append(f"wrong shape of {where}: expected {expected[name]}, found {entry.shape}")
        elif name in expected and entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            problems.append(f"dtype {entry.dtype} of {where}: expected one of {known}; dequantize the model first")
        elif name not in expected and name not in allowed and not is_ignorable(name):
            problems.append(f"extra tensor {where}, shape {entry.shape}: a {config.family} model has no such weight")
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "\n  ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({config.family}):\n  {listed}{more}\n"
            "Download the model again, or use the config.json that belongs to these weights"
        )


def iter_hf_tensors(
    params: Params, config: ModelConfig, names: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, host array in its layout), one at a time: the exact inverse of `load_params`.

    With several processes every process must run it to the end: a tensor is gathered by all of them.

    Args:
      names: only these tensors (still in the order of the forward pass); None means all.
    """
    sizes = axis_sizes(config)
    for tensor in checkpoint_tensors(config):
        if names is None or tensor.hf_name in names:
            value = _gather(_get(params, tensor.path), tensor.layer)
            assert value.shape == tensor.shape, (tensor, value.shape)
            letters = {axis: sizes[axis] for group in split_axes(tensor.backward.split("->")[0]) for axis in group}
            yield tensor.hf_name, np.ascontiguousarray(rearrange(value, tensor.backward, **letters))


class _Reader:
    """Safetensors files, each opened once; `read` gives a slice of one tensor after checking that it is finite."""

    def __init__(self, stack: ExitStack, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def read(self, name: str, index: Index) -> np.ndarray:
        from safetensors import safe_open

        path = self.entries[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="np"))
        values = self._files[path].get_slice(name)[index]
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name} in {path} holds NaN or Inf: the model is damaged, take another copy")
        return values


def _place(
    reader: _Reader, tensor: Tensor, config: ModelConfig, sharding: Sharding, dtype: np.dtype, stacked: Any
) -> jax.Array:
    """Puts one tensor on its devices; a layer goes into its place of the stacked leaf, which the first makes."""
    read = _slice_reader(reader, tensor, config, dtype)
    if tensor.layer is None:
        return jax.block_until_ready(jax.make_array_from_callback(tensor.shape, sharding, read, dtype))
    layer = jax.make_array_from_callback(tensor.shape, _without_layers(sharding), read, dtype)
    if stacked is None:
        shape = (layer_pattern(config).repeats, *tensor.shape)
        stacked = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    # Waiting keeps the host slices of one tensor alive at a time, not those of every write still under way.
    return jax.block_until_ready(_layer_writer(sharding)(stacked, layer, tensor.layer))


@functools.lru_cache(maxsize=64)
def _layer_writer(sharding: Sharding) -> Callable[..., jax.Array]:
    def write(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _slice_reader(
    reader: _Reader, tensor: Tensor, config: ModelConfig, dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """A function from an index in the decoder's layout to its values, read once for all devices that share it."""
    sizes = axis_sizes(config)
    hf_axes, own_axes = (split_axes(side) for side in tensor.forward.split("->"))
    done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: Index) -> np.ndarray:
        bounds = {axis: part.indices(sizes[axis])[:2] for (axis,), part in zip(own_axes, index, strict=True)}
        key = tuple(bounds.values())
        if key not in done:
            done[key] = _read_bounds(bounds)
        return done[key]

    def _read_bounds(bounds: dict[str, tuple[int, int]]) -> np.ndarray:
        # Of a fused axis "(h k)" a range of h is one range of rows; k is read whole and cut below.
        rows: list[slice] = []
        inner: set[str] = set()
        for group in hf_axes:
            width = sizes[group[1]] if len(group) == 2 else 1
            inner.update(group[1:])
            rows.append(slice(bounds[group[0]][0] * width, bounds[group[0]][1] * width))
        lengths = {axis: sizes[axis] if axis in inner else stop - start for axis, (start, stop) in bounds.items()}
        values = rearrange(reader.read(tensor.hf_name, tuple(rows)), tensor.forward, **lengths)
        cut = tuple(slice(*bounds[axis]) if axis in inner else slice(None) for (axis,) in own_axes)
        return np.ascontiguousarray(values[cut].astype(dtype))

    return read


def _require_tied(reader: _Reader, folder: Path) -> None:
    num_rows = reader.entries[EMBEDDING.hf_name].shape[0]
    if reader.entries[HEAD.hf_name].shape != reader.entries[EMBEDDING.hf_name].shape:
        raise ValueError(
            f"{folder}: tie_word_embeddings is true, but {HEAD.hf_name} and {EMBEDDING.hf_name} differ in shape"
        )
    for start in range(0, num_rows, _COMPARED_ROWS):
        rows = (slice(start, min(start + _COMPARED_ROWS, num_rows)), slice(None))
        if not np.array_equal(reader.read(HEAD.hf_name, rows), reader.read(EMBEDDING.hf_name, rows)):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {HEAD.hf_name} and {EMBEDDING.hf_name} hold "
                "different values; set tie_word_embeddings to false in config.json, or remove the wrong tensor"
            )


def _gather(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of a stacked leaf (or a whole leaf) on this host, from all processes."""
    sharding = leaf.sharding if layer is None else _without_layers(leaf.sharding)
    if not leaf.is_fully_addressable:
        assert isinstance(sharding, NamedSharding), sharding
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return np.asarray(_layer_getter(sharding, layer is not None)(leaf, 0 if layer is None else layer))


@functools.lru_cache(maxsize=64)
def _layer_getter(sharding: Sharding, stacked: bool) -> Callable[..., jax.Array]:
    def get(leaf: jax.Array, index: jax.Array) -> jax.Array:
        # A copy, since a jax.Array keeps the host value it once gave: params would grow a copy in host memory.
        return jax.lax.dynamic_index_in_dim(leaf, index, axis=0, keepdims=False) if stacked else jnp.copy(leaf)

    return jax.jit(get, out_shardings=sharding)


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked leaf."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    assert isinstance(sharding, SingleDeviceSharding), sharding
    return sharding


def _one_device() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
