"""Safetensors <-> params: tensor by tensor, host memory holding no second copy of the model in either direction.

Loading: a leaf is filled from its pieces (see `hf_names`). Of each, only what the shards of this process hold is read,
by several threads, in chunks of a few MiB that are checked, cast and laid out while they are in the cache. On a CPU
they go to the memory of the params itself, elsewhere to buffers of a bounded number of bytes that then travel.

Any leaf may be filled from many tensors, and any tensor may fill many leaves: all it takes is rows in `hf_names`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params, Transformer
from jdpo.models.weights.filling import CHUNK_BYTES, Filler
from jdpo.models.weights.hf_names import hf_tensors, is_ignorable, layout_of, leaves, with_prefix
from jdpo.models.weights.host_arrays import hf_blocks
from jdpo.models.weights.leaf_buffers import Block, LeafBuffers, blocks_of, placed
from jdpo.models.weights.resize import resize_embeddings
from jdpo.models.weights.safetensors_folder import DTYPES, TensorEntry, TensorFiles, source_dtypes, tensor_entries
from jdpo.processes import together
from jdpo.safe_text import terminal

__all__ = ["check_tensors", "iter_hf_tensors", "load_params", "resize_embeddings", "source_dtypes"]

_MAX_LISTED = 10
_MAX_NAMED = 3
WRAPPERS = {
    "_orig_mod": "torch.compile writes `_orig_mod.` into names",
    "module": "DataParallel writes `module.` into names",
    "_fsdp_wrapped_module": "FSDP writes `_fsdp_wrapped_module.` into names",
    "_checkpoint_wrapped_module": "activation checkpointing writes `_checkpoint_wrapped_module.` into names",
}
"""Parts of names that torch's wrappers leave in weights saved from the wrapper."""

_FUSED_EXPERTS = ".experts.gate_up_proj"
_BUFFER_BYTES = 2**30
_MAX_THREADS = 32

Transform = Callable[[tuple[str, ...], jax.Array], Any]


def load_params(
    folder: Path,
    model: Transformer | ModelConfig,
    shardings: Any = None,
    *,
    dtype: Any = jnp.float32,
    transform: Transform | None = None,
    buffer_bytes: int | None = None,
) -> Params:
    """Reads a Hugging Face folder into the params tree of `model`, each tensor straight to its shard.

    Args:
      folder: config.json beside model.safetensors, or beside shards and their index.
      shardings: a tree of jax.sharding.Sharding shaped like `abstract_params(model)`; None means one device.
      dtype: of the parameters, whatever the files hold.
      transform: (path of a leaf in the tree, the leaf on its devices) -> what takes its place, such as a quantized
        leaf; called on every leaf as soon as it is filled, in the same order on every process, and before the whole
        model is there, so that it never is in its first form.
      buffer_bytes: host memory for weights on their way to a device; None: 1 GiB, or none where the device is the CPU.

    Raises:
      ValueError: a file missing, truncated or a git-LFS pointer; a tensor missing, unknown, of another shape or a
        quantized dtype, holding NaN or Inf. Tensor and file are named; all but NaN and Inf come before any read.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    entries = together(lambda: _checked_entries(folder, config))
    params: Params = {}
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with TensorFiles(entries) as files, ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as pool:
        keeps_leaves = transform is None
        filled = _filled(
            Filler(files, pool), config, shardings, np.dtype(dtype), buffer_bytes, keeps_leaves=keeps_leaves
        )
        # Closed whatever is raised here: threads may be writing to the memory of leaves that follow.
        with closing(filled):
            # Every process has a leaf, or none goes on: what is made of it may be made by all of them together.
            while (following := together(lambda: next(filled, None))) is not None:
                path, leaf = following
                parent = params
                for key in path[:-1]:
                    parent = parent.setdefault(key, {})
                parent[path[-1]] = leaf if transform is None else transform(path, leaf)
    return params


def _checked_entries(folder: Path, config: ModelConfig) -> dict[str, TensorEntry]:
    """Where all tensors that the model needs stand; of tied weights that are there twice both are read."""
    entries = with_prefix(tensor_entries(folder), config)
    check_tensors(folder, entries, config)
    if config.tie_embeddings and layout_of(config).head.hf_name in entries:
        with TensorFiles(entries) as files:
            _require_tied(files, entries, folder, config)
    return entries


def check_tensors(folder: Path, entries: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Holds the tensors of a folder against those the model needs; one ValueError lists all that is wrong."""
    expected = {name: pieces[0].hf_shape for name, pieces in hf_tensors(config).items()}
    entries, head = with_prefix(entries, config), layout_of(config).head.hf_name
    _refuse_other_names(folder, entries, expected, config)
    # Of tied weights that are there twice both are read, to be compared.
    shapes = expected | ({head: expected[layout_of(config).embedding.hf_name]} if config.tie_embeddings else {})
    problems = [
        f"missing tensor {name}, expected shape {shape}" for name, shape in expected.items() if name not in entries
    ]
    for name, entry in entries.items():
        where = terminal(f"{name} in {entry.file.name}")
        if name in shapes and entry.shape != shapes[name]:
            problems.append(f"wrong shape of {where}: expected {shapes[name]}, found {entry.shape}")
        elif name in shapes and entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            found = terminal(entry.dtype)
            problems.append(f"dtype {found} of {where}: expected one of {known}; dequantize the model first")
        elif name not in shapes and not is_ignorable(name, config):
            problems.append(f"extra tensor {where}, shape {entry.shape}: a {config.family} model has no such weight")
    if problems:
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "\n  ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({config.family}):\n  {listed}{more}\n"
            f"{_advice(entries, shapes, config)}"
        )


def _refuse_other_names(folder: Path, entries: Collection[str], expected: Collection[str], config: ModelConfig) -> None:
    """Refuses tensors whose names hold the name of a wrapper, or among which is no name of the family."""
    wrappers = [name for name in WRAPPERS if any(name in entry.split(".") for entry in entries)]
    is_known = any(name in expected for name in entries) or _has_fused_experts(entries, expected, config)
    if not wrappers and is_known:
        return
    entries = sorted(entries, key=lambda entry: (not set(wrappers) & set(entry.split(".")), entry))
    found, wanted = (", ".join(map(terminal, [*names][:_MAX_NAMED])) for names in (entries, expected))
    more = f" and {len(entries) - _MAX_NAMED:,} more" if len(entries) > _MAX_NAMED else ""
    remedy = (
        f"{' and '.join(WRAPPERS[name] for name in wrappers)}: save the model inside the wrapper "
        f"(`model.{wrappers[0]}.save_pretrained(OUT)`), or take `{wrappers[0]}.` out of every name, in the weight_map "
        "of an index too"
        if wrappers
        else "Rename the tensors, or use the config.json that belongs to them"
    )
    raise ValueError(
        f"{folder}: the tensors do not have the names of a {config.family} model:\n  found {found}{more}\n"
        f"  expected {wanted}, ..\n{remedy}"
    )


def _advice(entries: dict[str, TensorEntry], known: Collection[str], config: ModelConfig) -> str:
    if _has_fused_experts(entries, known, config):
        return (
            "Its experts are stored as one tensor of all of them; save it with one tensor an expert, as transformers "
            "does unless told otherwise: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    return "Download the model again, or use the config.json that belongs to these weights"


def _has_fused_experts(entries: Collection[str], known: Collection[str], config: ModelConfig) -> bool:
    return config.moe is not None and any(name.endswith(_FUSED_EXPERTS) for name in entries if name not in known)


class _Filling(NamedTuple):
    """A block under way."""

    path: tuple[str, ...]
    block: Block
    buffers: LeafBuffers
    futures: list[Future[None]]
    num_bytes: int
    shape: tuple[int, ...]
    is_last: bool


def _filled(
    filler: Filler,
    config: ModelConfig,
    shardings: Any,
    dtype: np.dtype,
    buffer_bytes: int | None,
    *,
    keeps_leaves: bool,
) -> Generator[tuple[tuple[str, ...], jax.Array]]:
    """Yields every leaf on its devices; blocks that follow are read meanwhile, as many as the buffers hold."""
    waiting: deque[_Filling] = deque()
    stacked: jax.Array | None = None

    def finished() -> Iterator[tuple[tuple[str, ...], jax.Array]]:
        nonlocal stacked
        filling = waiting[0]
        for future in filling.futures:
            future.result()
        waiting.popleft()
        if filler.faults:
            raise ValueError("\n".join(list(filler.faults.values())[:_MAX_LISTED]))
        stacked = placed(stacked, filling.block, filling.buffers.finish(), filling.shape)
        if filling.is_last:
            leaf, stacked = stacked, None
            yield filling.path, leaf

    limit = buffer_bytes or _BUFFER_BYTES
    try:
        for path, (shape, pieces) in leaves(config).items():
            sharding = _get(shardings, path) if shardings is not None else _one_device()
            in_place = buffer_bytes is None and _is_cpu(sharding)
            most = None if in_place else limit // 2  # one travels while the next is read
            blocks = list(blocks_of(shape, sharding, dtype, most, divisible=bool(pieces[0].at)))
            for block in blocks:
                num_bytes = block.num_bytes(dtype)
                # Memory that is filled in place is needed in any case, unless leaves are transformed.
                held = 0 if in_place and keeps_leaves else num_bytes
                while waiting and sum(filling.num_bytes for filling in waiting) + held > limit:
                    yield from finished()
                buffers = LeafBuffers(block, sharding, dtype, in_place=in_place)
                first, last = block.rows or (0, 0)
                chosen = pieces if block.rows is None else [piece for piece in pieces if first <= piece.at[0] < last]
                futures = filler.fill(chosen, first, buffers.parts)
                waiting.append(_Filling(path, block, buffers, futures, held, shape, block is blocks[-1]))
        while waiting:
            yield from finished()
    finally:
        filler.end()  # the memory that is filled goes with this frame, and not before its threads have ended


def iter_hf_tensors(
    params: Params, config: ModelConfig, names: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, host array in its layout), one at a time: the exact inverse of `load_params`.

    With several processes every process must run it to the end: a tensor's slices travel to all of them.

    Args:
      names: only these tensors (still in the order of the forward pass); None means all.
    """
    for name, take in hf_blocks(params, config):
        if names is None or name in names:
            blocks = take()
            values = np.empty(blocks[0][0].hf_shape, blocks[0][1].dtype)
            for piece, block in blocks:
                piece.window.view(values.reshape(-1))[...] = block
            yield name, values


def _require_tied(files: TensorFiles, entries: dict[str, TensorEntry], folder: Path, config: ModelConfig) -> None:
    head_name, embedding_name = layout_of(config).head.hf_name, layout_of(config).embedding.hf_name
    size = math.prod(entries[head_name].shape)
    for start in range(0, size, CHUNK_BYTES):
        head, embedding = (
            np.empty(min(CHUNK_BYTES, size - start), files.dtype(name)) for name in (head_name, embedding_name)
        )
        files.read_into(head_name, start, head)
        files.read_into(embedding_name, start, embedding)
        if not np.array_equal(head, embedding, equal_nan=True):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {head_name} and {embedding_name} hold "
                "different values; set tie_word_embeddings to false in config.json, or remove the wrong tensor"
            )


def _is_cpu(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.addressable_devices)


def _one_device() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
