"""Reads a Hugging Face folder into the params, without a second copy of the model in host memory.

Each leaf is filled from its pieces (see `hf_names`). Only what the shards of this process hold is read, by several
threads, in chunks of a few MiB that are checked and laid out while they are in the cache (see `staging`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jdpo import words
from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params, Transformer
from jdpo.models.weights.folder_names import by_model_name, is_carried, is_ignorable
from jdpo.models.weights.hf_names import hf_tensors, layout_in, layout_of, leaves
from jdpo.models.weights.resize import resize_embeddings
from jdpo.models.weights.safetensors_folder import DTYPES, TensorEntry, TensorFiles, tensor_entries
from jdpo.models.weights.staging import CHUNK_BYTES, SLAB_BYTES, Leaf, filled_leaves
from jdpo.processes import run_jointly
from jdpo.safe_text import terminal

__all__ = ["check_tensors", "load_params", "resize_embeddings"]

_MAX_LISTED = 10
_MAX_NAMED = 3
WRAPPERS = {
    "_orig_mod": "torch.compile writes `_orig_mod.` into names",
    "module": "DataParallel writes `module.` into names",
    "_fsdp_wrapped_module": "FSDP writes `_fsdp_wrapped_module.` into names",
    "_checkpoint_wrapped_module": "activation checkpointing writes `_checkpoint_wrapped_module.` into names",
}
"""Parts of names that torch's wrappers leave in weights saved from the wrapper."""

# The maps of all experts in one tensor, under the name that transformers' classes have in memory.
_FUSED_EXPERTS = ".experts.gate_up_proj"
_MAX_THREADS = 32

Transform = Callable[[tuple[str, ...], jax.Array], Any]


def load_params(
    folder: Path,
    model: Transformer | ModelConfig,
    shardings: Any = None,
    *,
    dtype: Any = jnp.float32,
    transform: Transform | None = None,
    slab_bytes: int = SLAB_BYTES,
) -> Params:
    """Reads a Hugging Face folder into the params tree of `model`, each tensor straight to its shard.

    Args:
      folder: config.json next to model.safetensors, or next to shards and their index.
      shardings: a tree of jax.sharding.Sharding shaped like `abstract_params(model)`; None means one device.
      dtype: dtype of the parameters, whatever the files hold.
      transform: (path of a leaf in the tree, the leaf on its devices) -> the value that replaces it, such as a
        quantized leaf. Called on every leaf as soon as it is filled, in the same order on every process, so that the
        whole model never exists in its original form.
      slab_bytes: size of the part of a leaf that is staged in host memory; two of them are there at a time.

    Raises:
      ValueError: a file is missing, truncated or a git-LFS pointer; a tensor is missing, unknown, of another shape or a
        quantized dtype, or holds NaN or Inf. Tensor and file are named; all but NaN and Inf are found before any read.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    # All processes check the files, which may differ from host to host, before any of them reads weights.
    entries = run_jointly(lambda: _checked_entries(folder, config))
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    to_fill = [
        Leaf(path, shape, pieces, one_device if shardings is None else _get(shardings, path), np.dtype(dtype))
        for path, (shape, pieces) in leaves(config, layout_in(entries, config)).items()
    ]
    params: Params = {}
    # The cores that this process may use, which can be fewer than those of the machine.
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with TensorFiles(entries) as files, ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        filled = filled_leaves(to_fill, files, pool, slab_bytes)
        # Either every process has the leaf or none continues: `transform` may be computed by all of them together.
        while (following := run_jointly(lambda: next(filled, None))) is not None:
            path, leaf = following
            parent = params
            for key in path[:-1]:
                parent = parent.setdefault(key, {})
            parent[path[-1]] = leaf if transform is None else transform(path, leaf)
    return params


def _checked_entries(folder: Path, config: ModelConfig) -> dict[str, TensorEntry]:
    """Returns all tensors of a folder, once they are known to be those that the model needs."""
    entries = by_model_name(tensor_entries(folder), config)
    check_tensors(folder, entries, config)
    # Some exporters store a tied head as well; if it differed, it would be unclear which of the two is meant.
    if config.tie_embeddings and layout_of(config).head.hf_name in entries:
        with TensorFiles(entries) as files:
            _require_tied(files, entries, folder, config)
    return entries


def check_tensors(folder: Path, entries: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Compares the tensors of a folder with those that the model needs.

    Raises:
      ValueError: the first ten differences are listed, with what to do about them.
    """
    entries, head = by_model_name(entries, config), layout_of(config).head.hf_name
    expected = {name: pieces[0].hf_shape for name, pieces in hf_tensors(config, layout_in(entries, config)).items()}
    _refuse_other_names(folder, entries, expected, config)
    # Tied weights may be stored twice; both are then read and compared.
    shapes = expected | ({head: expected[layout_of(config).embedding.hf_name]} if config.tie_embeddings else {})
    problems = [
        f"missing tensor {name}, expected shape {shape}" for name, shape in expected.items() if name not in entries
    ]
    for name, entry in entries.items():
        where = terminal(f"{name} in {entry.file.name}")
        if name in shapes and entry.shape != shapes[name]:
            problems.append(f"wrong shape of {where}: expected {shapes[name]}, found {entry.shape}")
        elif name in shapes and entry.numbers is None:
            known = ", ".join(DTYPES)
            found = terminal(entry.dtype)
            problems.append(f"dtype {found} of {where}: expected one of {known}; dequantize the model first")
        elif name not in shapes and not is_ignorable(name, config) and not is_carried(name, config):
            problems.append(f"extra tensor {where}, shape {entry.shape}: a {config.family} model has no such weight")
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "\n  ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({config.family}):\n  {listed}{more}\n"
            f"{_advice(entries, shapes, config)}"
        )


def _refuse_other_names(folder: Path, entries: Collection[str], expected: Collection[str], config: ModelConfig) -> None:
    """Refuses tensors whose names contain that of a torch wrapper, or none of which has a name of the family."""
    wrappers = [name for name in WRAPPERS if any(name in entry.split(".") for entry in entries)]
    is_known = any(name in expected for name in entries) or _has_fused_experts(entries, expected, config)
    if not wrappers and is_known:
        return
    # Names with a wrapper's part come first, since the message shows only a few.
    entries = sorted(entries, key=lambda entry: (not set(wrappers) & set(entry.split(".")), entry))
    found = words.listed([terminal(name) for name in entries], _MAX_NAMED)
    wanted = ", ".join(map(terminal, [*expected][:_MAX_NAMED]))
    remedy = (
        f"{' and '.join(WRAPPERS[name] for name in wrappers)}: save the model inside the wrapper "
        f"(`model.{wrappers[0]}.save_pretrained(OUT)`), or remove `{wrappers[0]}.` from every name, also in the "
        "weight_map of an index"
        if wrappers
        else "Rename the tensors, or use the config.json that belongs to them"
    )
    raise ValueError(
        f"{folder}: the tensors do not have the names of a {config.family} model:\n  found {found}\n"
        f"  expected {wanted}, ..\n{remedy}"
    )


def _advice(entries: dict[str, TensorEntry], known: Collection[str], config: ModelConfig) -> str:
    if _has_fused_experts(entries, known, config):
        return (
            "All its experts are stored in one tensor; save it with one tensor per expert, which is the default of "
            "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    return "Download the model again, or use the config.json that belongs to these weights"


def _has_fused_experts(entries: Collection[str], known: Collection[str], config: ModelConfig) -> bool:
    return config.moe is not None and any(name.endswith(_FUSED_EXPERTS) for name in entries if name not in known)


def _require_tied(files: TensorFiles, entries: dict[str, TensorEntry], folder: Path, config: ModelConfig) -> None:
    head_name, embedding_name = layout_of(config).head.hf_name, layout_of(config).embedding.hf_name
    size = math.prod(entries[head_name].shape)
    # In chunks, so that a large vocabulary is never in memory as a whole.
    for start in range(0, size, CHUNK_BYTES):
        head, embedding = (
            np.empty(min(CHUNK_BYTES, size - start), files.dtype(name)) for name in (head_name, embedding_name)
        )
        files.read_into(head_name, start, head)
        files.read_into(embedding_name, start, embedding)
        # NaN is reported with its own message when the embedding is read.
        if not np.array_equal(head, embedding, equal_nan=True):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {head_name} and {embedding_name} hold "
                "different values; set tie_word_embeddings to false in config.json, or remove the wrong tensor"
            )


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
