"""The tensors of an exported folder, and the files that hold them; known before any weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from jdpo.models.families.layouts import Layout
from jdpo.models.model_config import ModelConfig
from jdpo.models.weights.folder_names import by_model_name, carried, is_carried, model_names
from jdpo.models.weights.hf_names import hf_tensors, layout_in
from jdpo.models.weights.safetensors_folder import DTYPES, SINGLE_NAME, TensorEntry, tensor_entries

ExportDtype = Literal["source", "float32", "bfloat16", "float16"]

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FileTensor(NamedTuple):
    """A tensor of an exported folder.

    Attributes:
      dtype: its name in safetensors.
      model_name: its name in the layout; None if the tensor is carried, which means copied from the source.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    model_name: str | None


class ExportPlan(NamedTuple):
    """The content of an export.

    Attributes:
      tensors: by their names in the files, in the order of the forward pass; carried ones are last.
      source: the tensors of the folder that training started from that are carried, by the same names.
      main_dtype: dtype that config.json names.
      layout: of the tensors; their names in it are `FileTensor.model_name`.
    """

    tensors: dict[str, FileTensor]
    source: dict[str, TensorEntry]
    main_dtype: np.dtype
    layout: Layout


def plan_export(config: ModelConfig, source_folder: Path, export_dtype: str) -> ExportPlan:
    """Returns the tensors of an export: their names are those of `source_folder`, and so are the dtypes of "source".

    Raises:
      ValueError: export_dtype is unknown, or the headers of the source cannot be read.
    """
    if export_dtype != "source" and export_dtype not in _DTYPES:
        raise ValueError(f"export_dtype: expected source, {', '.join(_DTYPES)}, found {export_dtype!r}")
    entries = tensor_entries(source_folder)
    layout = layout_in(by_model_name(entries, config), config, for_export=True)
    dtypes, main_dtype = _dtypes(config, entries, layout, export_dtype)
    # A model that was saved without its head gets the prefix of one that has it; other spellings are kept.
    kept = model_names(entries, config) if layout.spellings else {}
    in_file = {own: name for name, own in kept.items()}
    tensors = {}
    for name, pieces in hf_tensors(config, layout).items():
        dtype, shape = dtypes[name], pieces[0].hf_shape
        num_bytes = math.prod(shape) * dtype.itemsize
        tensors[in_file.get(name, name)] = FileTensor(shape, _DTYPE_NAMES[dtype], num_bytes, name)
    others = carried(entries, config)
    for name, entry in others.items():
        tensors[name] = FileTensor(entry.shape, entry.dtype, entry.num_bytes, None)
    return ExportPlan(tensors, others, main_dtype, layout)


def export_dtypes(config: ModelConfig, source_folder: Path, export_dtype: str) -> list[np.dtype]:
    """Returns the dtypes in which an export has the tensors of the model, without those that are carried."""
    tensors = plan_export(config, source_folder, export_dtype).tensors.values()
    return [DTYPES[tensor.dtype] for tensor in tensors if tensor.model_name is not None]


def _dtypes(
    config: ModelConfig, entries: dict[str, TensorEntry], layout: Layout, export_dtype: str
) -> tuple[dict[str, np.dtype], np.dtype]:
    """Returns the dtype of every tensor of the model, and the one for config.json."""
    names = hf_tensors(config, layout)
    if export_dtype in _DTYPES:
        return dict.fromkeys(names, _DTYPES[export_dtype]), _DTYPES[export_dtype]
    source = {
        name: entry.numbers
        for name, entry in by_model_name(entries, config).items()
        if entry.numbers is not None and not is_carried(name, config)
    }
    # For tensors that the source lacks, such as the head of a model that was saved without it.
    most_common = Counter(source.values()).most_common(1)[0][0]
    return {name: source.get(name, most_common) for name in names}, most_common


class ShardFile(NamedTuple):
    """One safetensors file to write: its name and the tensors it holds."""

    name: str
    tensor_names: list[str]


def plan_shards(tensors: Mapping[str, FileTensor], max_bytes: int) -> list[ShardFile]:
    """Fills files in the order of the tensors, each up to max_bytes; a larger tensor gets its own file."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.num_bytes
    if len(groups) == 1:
        return [ShardFile(SINGLE_NAME, groups[0])]
    return [
        ShardFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names)
        for number, names in enumerate(groups, start=1)
    ]
