"""The tensors of a Hugging Face folder: which file holds which, of what shape and dtype; headers only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
    """Where a tensor stands, and what its file's header says of it (`dtype` as safetensors names it)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder by name, from the headers of its one or many files; no tensor data is read.

    Raises:
      ValueError: no folder, no weights, a shard missing, truncated, damaged or a git-LFS pointer, a broken index.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist (or is not a folder)")
    index_path = folder / INDEX_NAME
    # transformers takes the single file where both are there.
    if (folder / SINGLE_NAME).is_file() or not index_path.is_file():
        return _read_header(_single_file(folder))
    weight_map = _read_weight_map(index_path)
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not path.is_file():
            raise ValueError(
                f"{folder}: shard {file_name} is listed in {INDEX_NAME} but is not there; download it again"
            )
        headers[file_name] = _read_header(path)
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise ValueError(f"{index_path}: tensor {name} should be in {file_name}, but that file does not hold it")
    # Where two shards hold a tensor of one name, the index decides.
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    return entries | {name: headers[file_name][name] for name, file_name in weight_map.items()}


def source_dtypes(folder: Path) -> dict[str, np.dtype]:
    """The dtype of every tensor of the folder, by tensor name; raises ValueError as `tensor_entries` does."""
    return {name: DTYPES[entry.dtype] for name, entry in tensor_entries(folder).items() if entry.dtype in DTYPES}


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; jdpo reads safetensors only")
    if folder / SINGLE_NAME in files:
        return folder / SINGLE_NAME
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:3])
        raise ValueError(
            f"{folder} holds {len(files)} safetensors files ({names}, ..) but no {INDEX_NAME} to name their tensors"
        )
    return files[0]


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a 'weight_map' object: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: 'weight_map' is empty or not an object")
    for name, file_name in weight_map.items():
        # A path out of the folder would read whatever a downloaded index points at.
        if not isinstance(file_name, str) or file_name != Path(file_name).name or "\\" in file_name:
            raise ValueError(f"{path}: tensor {name} points at {file_name!r}; expected a bare file name")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Parses a safetensors header (u64 length, JSON) and holds it against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if _LFS_PREFIX.startswith(start) and start:
            raise ValueError(
                f"{path} is a git-LFS pointer, not the tensor file itself; run `git lfs pull` in that folder"
            )
        if len(start) < 8:
            raise ValueError(f"{path} is truncated: {size} bytes, too few for a safetensors header; download it again")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: it claims a header of {header_bytes} bytes")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ValueError(f"{path} is truncated within its header: {size} bytes; download it again")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: TensorEntry(path, tuple(info["shape"]), info["dtype"]) for name, info in header.items()}
        data_bytes = max((info["data_offsets"][1] for info in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: damaged safetensors header: {error!r}") from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        what = "is truncated" if size < expected else "has bytes behind its last tensor"
        raise ValueError(
            f"{path} {what}: its header speaks of {expected} bytes, the file has {size}; download it again"
        )
    return entries
