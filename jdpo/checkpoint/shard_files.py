"""Writes the safetensors files of a model straight from the params; neither a file nor the model is copied in memory.

Tensors that belong to other parts of the model are copied from the folder that training started from, byte for byte.

The header depends only on names, shapes and dtypes, so the offset of every tensor is known from the start. Threads
cast, transpose and check chunks of a few MiB in the cache and write them there.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jdpo.checkpoint.export_plan import ExportPlan, FileTensor, ShardFile
from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params
from jdpo.models.weights.casting import PADDING_BYTES, Scratch, all_finite, bits, copy_cast, is_narrower
from jdpo.models.weights.host_arrays import HostPiece, host_tensors
from jdpo.models.weights.safetensors_folder import DTYPES, INDEX_NAME, TensorFiles
from jdpo.models.weights.staging import CHUNK_BYTES
from jdpo.models.weights.strided_views import Range, StridedView, common_ranges

# Limits the host memory of tensors that have arrived from the devices but are not written yet.
_BYTES_UNDER_WAY = 2**30
_MAX_THREADS = 16


def write_shards(
    params: Params, config: ModelConfig, plan: ExportPlan, shards: Sequence[ShardFile], folder: Path
) -> None:
    """Writes the files of this process, and on the first process the index. Every process must call this.

    The processes take turns with the files. An error on one process is raised only after the last tensor, since the
    others need its slices until then.

    Raises:
      ValueError: a tensor contains NaN or Inf, or values that its dtype cannot hold; a carried one cannot be read.
      OSError: a file cannot be written.
    """
    mine = shards[jax.process_index() :: jax.process_count()]
    owned = frozenset(name for shard in mine for name in shard.tensor_names)
    in_file = {tensor.model_name: name for name, tensor in plan.tensors.items()}
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with (
        TensorFiles(plan.source) as source,
        ThreadPoolExecutor(num_threads, thread_name_prefix="export") as pool,
        _Writer(pool) as writer,
    ):
        for shard in mine:
            writer.create(folder / shard.name, {name: plan.tensors[name] for name in shard.tensor_names})
        for model_name, take in host_tensors(params, config, plan.layout):
            if in_file[model_name] in owned:
                writer.write(in_file[model_name], take)
            # With several processes the loop goes to its end: every tensor's slices travel between all of them.
            if writer.error is not None and jax.process_count() == 1:
                break
        for name in plan.source:
            if name in owned:
                writer.copy(name, source)
        writer.finish()
        if jax.process_index() == 0 and len(shards) > 1:
            metadata = {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in plan.tensors.values()),
                "total_size": sum(tensor.num_bytes for tensor in plan.tensors.values()),
            }
            weight_map = {name: shard.name for shard in shards for name in shard.tensor_names}
            index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
            (folder / INDEX_NAME).write_text(index + "\n", encoding="utf-8")


class _Place(NamedTuple):
    """The position of a tensor in a file."""

    descriptor: int
    offset: int
    tensor: FileTensor

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a tensor that is written from the params; carried ones may have any."""
        return DTYPES[self.tensor.dtype]


class _Writer:
    """The open files, and the chunks that are being written to them.

    Attributes:
      error: the first error of any thread; nothing is written after it.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.error: Exception | None = None
        self._pool = pool
        self._descriptors: list[int] = []
        self._places: dict[str, _Place] = {}
        self._waiting: deque[tuple[int, list[Future[None]]]] = deque()
        self._scratch = Scratch()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for _, futures in self._waiting:
            for future in futures:
                future.cancel()
        self._pool.shutdown()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def create(self, path: Path, tensors: Mapping[str, FileTensor]) -> None:
        """Creates a file with its header."""
        self._guarded(self._create, path, tensors)

    def _create(self, path: Path, tensors: Mapping[str, FileTensor]) -> None:
        # The format that loaders of torch models look for, although the file has nothing of torch in it.
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # Wide elements first, so that every tensor is aligned to the size of its elements.
        for name, tensor in sorted(tensors.items(), key=lambda item: -_element_bytes(item[1])):
            offsets[name], begin = end, end
            end += tensor.num_bytes
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Spaces pad the header, so that the first tensor is aligned to 8 bytes.
        text += b" " * (-len(text) % 8)
        # O_EXCL: the folder is new, so a file that exists is another process's.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        # The format: the header's length in 8 bytes, the header, the tensors.
        _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name, tensor in tensors.items():
            self._places[name] = _Place(descriptor, 8 + len(text) + offsets[name], tensor)

    def write(self, name: str, take: Callable[[], Sequence[HostPiece]]) -> None:
        """Starts to write a tensor from its pieces; waits first if too many bytes are being written."""
        self._guarded(self._write, name, take)

    def _write(self, name: str, take: Callable[[], Sequence[HostPiece]]) -> None:
        place, pieces = self._places[name], take()
        num_bytes = place.tensor.num_bytes
        while self._waiting and sum(size for size, _ in self._waiting) + num_bytes > _BYTES_UNDER_WAY:
            self._wait()
        # Pieces that are dense in the file can be written in any order, each to its own range.
        if all(piece.view.is_dense for piece, _ in pieces):
            futures = [
                self._pool.submit(self._guarded, self._write_chunk, name, place, view, values[_slices(bounds)])
                for piece, values in pieces
                for bounds, view in piece.view.chunks(CHUNK_BYTES // place.dtype.itemsize)
            ]
        else:
            size, most = math.prod(place.tensor.shape), CHUNK_BYTES // place.dtype.itemsize
            futures = [
                self._pool.submit(self._guarded, self._write_range, name, place, found, pieces)
                for found in common_ranges([piece.view for piece, _ in pieces], size, most)
            ]
        self._waiting.append((num_bytes, futures))

    def copy(self, name: str, source: TensorFiles) -> None:
        """Starts to copy a carried tensor, a few MiB at a time."""
        num_bytes = self._places[name].tensor.num_bytes if self.error is None else 0
        futures = [
            self._pool.submit(self._guarded, self._copy_chunk, name, source, start, min(CHUNK_BYTES, num_bytes - start))
            for start in range(0, num_bytes, CHUNK_BYTES)
        ]
        self._waiting.append((0, futures))

    def finish(self) -> None:
        """Waits until everything is on the disk; raises the first error."""
        while self._waiting:
            self._wait()
        if self.error is None:
            try:
                for descriptor in self._descriptors:
                    # Before the folder is renamed to its final path.
                    os.fsync(descriptor)
            except OSError as error:
                self.error = error
        if self.error is not None:
            raise self.error

    def _wait(self) -> None:
        for future in self._waiting.popleft()[1]:
            future.result()

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        if self.error is None:
            try:
                work(*args)
            except Exception as error:  # raised at the end: other processes need this one's slices until then
                self.error = self.error or error

    def _write_chunk(self, name: str, place: _Place, view: StridedView, values: np.ndarray) -> None:
        run = self._scratch.array("run", view.span, place.dtype)
        self._lay_out(name, values, view, run)
        _write_all(place.descriptor, run.view(np.uint8).data, place.offset + view.start * place.dtype.itemsize)

    def _copy_chunk(self, name: str, source: TensorFiles, start: int, num_bytes: int) -> None:
        place, run = self._places[name], self._scratch.array("copy", num_bytes, np.dtype(np.uint8))
        source.read_into(name, start, run)
        _write_all(place.descriptor, run.data, place.offset + start)

    def _write_range(self, name: str, place: _Place, found: Range, pieces: Sequence[HostPiece]) -> None:
        """Writes a range of a tensor whose pieces are interleaved."""
        run = self._scratch.array("range", found.size, place.dtype)
        for (bounds, view), (_, values) in zip(found.parts, pieces, strict=True):
            self._lay_out(name, values[_slices(bounds)], view._replace(start=0), run[view.start - found.start :])
        _write_all(place.descriptor, run.view(np.uint8).data, place.offset + found.start * place.dtype.itemsize)

    def _lay_out(self, name: str, values: np.ndarray, view: StridedView, run: np.ndarray) -> None:
        """Casts values and writes them to the run; transposed ones by way of padded rows, which is faster."""
        if not all_finite(values):
            raise ValueError(f"tensor {name} holds NaN or Inf: this model is not exported")
        target = view._replace(start=0).array(run)
        if values.ndim > 1 and view.strides[-1] != 1:
            rows, length = math.prod(values.shape[:-1]), values.shape[-1]
            wide = length + PADDING_BYTES // run.itemsize
            memory = self._scratch.array("padded", rows * wide, run.dtype)
            padded = memory.reshape(*values.shape[:-1], wide)[..., :length]
        else:
            padded = self._scratch.array("padded", values.size, run.dtype).reshape(values.shape)
        copy_cast(values, padded)
        if is_narrower(run.dtype, values.dtype) and not all_finite(padded):
            raise ValueError(f"tensor {name} holds values that {run.dtype.name} cannot; export it in float32")
        bits(target)[...] = bits(padded)


def _element_bytes(tensor: FileTensor) -> float:
    # Of any dtype, also of those that only carried tensors have.
    return tensor.num_bytes / max(math.prod(tensor.shape), 1)


def _slices(bounds: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*part) for part in bounds)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        # A write may take fewer bytes than requested.
        count = os.pwrite(descriptor, rest, offset)
        offset, rest = offset + count, rest[count:]
