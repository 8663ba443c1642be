"""Finds the tensors of a Hugging Face folder with their shapes and dtypes, and reads ranges of their elements."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jdpo.models.weights import mxfp4
from jdpo.models.weights.casting import bits
from jdpo.models.weights.hub_models import require_plain_file
from jdpo.safe_text import terminal

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes weights are read in, by their safetensors names."""

_LFS_PREFIX = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class TensorEntry(NamedTuple):
    """A tensor as the header of its file describes it.

    Attributes:
      dtype: the dtype's name in safetensors.
      offset: number of bytes from the start of the file to the first element.
      num_bytes: size of all elements.
      scales: for a tensor in MXFP4, the tensor of its scales; then `shape` is that of the numbers.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int
    scales: TensorEntry | None = None

    @property
    def numbers(self) -> np.dtype | None:
        """The dtype that its elements are read as; None for one that is not read."""
        return DTYPES.get("BF16" if self.scales is not None else self.dtype)


class TensorFiles:
    """Reads ranges of elements of a folder's tensors from any number of threads; each file is opened once.

    Files are not mapped into memory: a mapped file that becomes shorter meanwhile would kill the process.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = entries
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that a tensor's elements are read as."""
        dtype = self._entries[name].numbers
        assert dtype is not None, name
        return dtype

    def place(self, name: str) -> str:
        """Returns the name of a tensor and its file, for messages."""
        return terminal(f"tensor {name} in {self._entries[name].file}")

    def read_into(self, name: str, start: int, run: np.ndarray) -> None:
        """Fills `run`, an array [n] of the tensor's dtype, with the elements from number `start` on.

        An array of uint8 gets the bytes from number `start` on, whatever the tensor's dtype.

        Raises:
          ValueError: the file cannot be read or is too short.
        """
        entry = self._entries[name]
        if entry.scales is None:
            self._read(name, entry, start, run)
            return
        # Whole groups, since the numbers of a group share a scale.
        groups = slice(start // mxfp4.GROUP, -(-(start + run.size) // mxfp4.GROUP))
        blocks = np.empty((groups.stop - groups.start, mxfp4.GROUP // 2), np.uint8)
        scales = np.empty(len(blocks), np.uint8)
        self._read(name, entry, groups.start * blocks.shape[1], blocks.reshape(-1))
        self._read(name, entry.scales, groups.start, scales)
        first = start - groups.start * mxfp4.GROUP
        bits(run)[...] = mxfp4.decoded(blocks, scales)[first : first + run.size]

    def _read(self, name: str, entry: TensorEntry, start: int, run: np.ndarray) -> None:
        offset, rest = entry.offset + start * run.itemsize, run.view(np.uint8).data
        try:
            while rest:
                # A read may return fewer bytes than requested.
                # With an offset of its own, so that threads can share a descriptor.
                count = os.preadv(self._descriptor(entry.file), [rest], offset)
                if not count:
                    raise ValueError(f"{entry.file} became shorter while it was read; download it again")
                offset, rest = offset + count, rest[count:]
        except OSError as error:
            raise ValueError(f"{entry.file}: cannot read tensor {terminal(name)}: {error.strerror or error}") from error

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Returns every tensor of a folder by name. Only the headers of its files are read.

    Raises:
      ValueError: no folder, no weights, a shard missing, truncated, damaged or a git-LFS pointer, a broken index.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist (or is not a folder)")
    index_path = folder / INDEX_NAME
    # transformers takes the single file where both are there.
    if (folder / SINGLE_NAME).is_file() or not index_path.is_file():
        return _joined_mxfp4(read_header(_single_file(folder)))
    weight_map = _read_weight_map(index_path)
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        # The hub's cache holds links to its blobs, so links are followed, wherever they lead.
        if not path.is_file():
            link = path.is_symlink()
            lost = f": it is a broken symlink to {terminal(os.readlink(path))}" if link else ""
            raise ValueError(
                f"{folder}: shard {terminal(file_name)} is listed in {INDEX_NAME} but does not exist{lost}; "
                "download it again"
            )
        headers[file_name] = read_header(path)
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise ValueError(
                f"{index_path}: tensor {terminal(name)} should be in {terminal(file_name)}, which does not contain it"
            )
    entries: dict[str, TensorEntry] = {}
    for name, entry in ((name, entry) for header in headers.values() for name, entry in header.items()):
        if name in entries:
            raise ValueError(
                f"{folder}: both {terminal(entries[name].file.name)} and {terminal(entry.file.name)} contain tensor "
                f"{terminal(name)}; download the model again, or remove the file that is not part of it"
            )
        entries[name] = entry
    return _joined_mxfp4(entries)


def _joined_mxfp4(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Returns the tensors with the blocks and scales of each MXFP4 tensor as one entry, under the name of the blocks.

    Raises:
      ValueError: blocks have no scales, or of another shape.
    """
    joined = dict(entries)
    for name, blocks in entries.items():
        if not name.endswith(mxfp4.BLOCKS) or blocks.dtype != "U8":
            continue
        of_scales = name.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES
        scales = joined.pop(of_scales, None)
        if len(blocks.shape) < 2 or blocks.shape[-1] != mxfp4.GROUP // 2:
            raise ValueError(
                f"{blocks.file}: {terminal(name)} is in MXFP4: expected the shape (.., groups, {mxfp4.GROUP // 2}), "
                f"found {blocks.shape}; download the model again"
            )
        if scales is None or scales.dtype != "U8" or scales.shape != blocks.shape[:-1]:
            found = "no such tensor" if scales is None else f"{terminal(scales.dtype)} of shape {scales.shape}"
            raise ValueError(
                f"{blocks.file}: {terminal(name)} of shape {blocks.shape} is in MXFP4, for which {terminal(of_scales)} "
                f"should be U8 of shape {blocks.shape[:-1]}; found {found}; download the model again"
            )
        shape = (*blocks.shape[:-2], blocks.shape[-2] * mxfp4.GROUP)
        num_bytes = blocks.num_bytes + scales.num_bytes
        joined[name] = blocks._replace(shape=shape, dtype="MXFP4", num_bytes=num_bytes, scales=scales)
    return joined


def in_mxfp4(entries: Mapping[str, TensorEntry]) -> bool:
    """Returns True if weights of a folder are in MXFP4."""
    return any(entry.scales is not None for entry in entries.values())


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors file, the only format that jdpo reads")
    if folder / SINGLE_NAME in files:
        return folder / SINGLE_NAME
    if len(files) > 1:
        names = ", ".join(terminal(path.name) for path in files[:3])
        raise ValueError(
            f"{folder} has {len(files)} safetensors files ({names}, ..) but no {INDEX_NAME} that lists their tensors"
        )
    return files[0]


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON with a 'weight_map' object: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: 'weight_map' is empty or not an object")
    for name, file_name in weight_map.items():
        # Otherwise a downloaded index could make us read any file of this machine.
        if not isinstance(file_name, str) or file_name != Path(file_name).name or "\\" in file_name:
            raise ValueError(f"{path}: tensor {terminal(name)} refers to {file_name!r}; expected a bare file name")
    return weight_map


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parses a safetensors header (u64 length, JSON) and compares it with the file's size.

    Raises:
      ValueError: the file is not a whole safetensors file.
    """
    require_plain_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # Checked first, since the pointer's text would be read as an absurd header length.
        if _LFS_PREFIX.startswith(start) and start:
            raise ValueError(f"{path} is a git-LFS pointer, not the tensor file; run `git lfs pull` in that folder")
        if len(start) < 8:
            raise ValueError(f"{path} is truncated: {size} bytes, too few for a safetensors header; download it again")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: its header would have {header_bytes} bytes")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ValueError(f"{path} is truncated within its header: {size} bytes; download it again")
    try:
        header: dict[str, Any] = json.loads(text)
        # Text of the program that wrote the file, not a tensor.
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            # Tensors must follow each other without gaps: the format's own rule, which finds damaged offsets.
            begin, after = info["data_offsets"]
            # The header's offsets count from its end, and 8 bytes before it hold its length.
            entry = TensorEntry(path, tuple(info["shape"]), info["dtype"], 8 + header_bytes + begin, after - begin)
            expected_bytes = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
            if begin != end or after < begin or expected_bytes not in (None, after - begin):
                raise ValueError(f"tensor {name} of shape {entry.shape} cannot be at {info['data_offsets']}")
            entries[name], end = entry, after
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: damaged safetensors header: {error!r}; download it again") from error
    expected = 8 + header_bytes + end
    if size != expected:
        what = "is truncated" if size < expected else "has bytes after its last tensor"
        raise ValueError(f"{path} {what}: its header implies {expected} bytes, the file has {size}; download it again")
    return entries
