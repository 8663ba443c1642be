"""Host arrays onto the mesh, and the shardings of what is not a weight."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.sharding.axes import BATCH_AXES
from jdpo.types import HOST_MEMORY


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """For [micro-batch, row, ...]: rows are split over the batch axes, micro-batches follow each other."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays on the mesh; each process hands over only the shards of its own devices.

    Every process holds the same host arrays (batches follow from the step number alone), so no data travels
    between hosts.
    """
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index]), tree
    )


def fetch(tree: Any) -> Any:
    """Replicated or fully addressable device arrays as numpy; valid on every process."""
    return jax.tree.map(
        lambda array: np.asarray(array.addressable_data(0) if not array.is_fully_addressable else array), tree
    )


def state_shardings(abstract_state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: its leaves under a weight's path, of its shape, are split as that weight.

    Args:
      abstract_state: tree of ShapeDtypeStructs, with subtrees that mirror `params` (moments).
      params: tree of arrays or ShapeDtypeStructs.
      param_shardings: tree like `params`.
      mesh: the device mesh; all other leaves are replicated (Adafactor's rows and columns are small).
    """
    structure = jax.tree.structure(params)

    def mirrors(node: Any) -> bool:
        return jax.tree.structure(node) == structure and structure.num_leaves > 0

    def of_weights(node: Any) -> Any:
        return jax.tree.map(
            lambda leaf, param, sharding: sharding if leaf.shape == param.shape else replicated(mesh),
            node,
            params,
            param_shardings,
        )

    return jax.tree.map(
        lambda node: of_weights(node) if mirrors(node) else replicated(mesh), abstract_state, is_leaf=mirrors
    )


def offloaded(shardings: Any, abstract_state: Any) -> Any:
    """The same shardings in the host's memory, for all leaves but scalars; see `check_host_memory`.

    Args:
      shardings: tree of NamedShardings.
      abstract_state: tree like it, of what has shapes.
    """
    return jax.tree.map(
        lambda sharding, leaf: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding,
        shardings,
        abstract_state,
    )


def check_host_memory(device: jax.Device, setting: str, instead: str) -> None:
    """Refuses a setting that keeps something in the host's memory where a device does not reach it.

    Args:
      device: one of this process's own.
      setting: as in the config.
      instead: what to do.

    Raises:
      ValueError: naming the device and the memory it has.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{setting} needs devices that reach {HOST_MEMORY} memory; {device.device_kind} ({device.platform}) has "
            f"{', '.join(kinds) or 'none that has a name'}. {instead}"
        )


def on_device(tree: Any) -> Any:
    """Leaves that lie in the host's memory moved to the device; within jit, where all arithmetic must be."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _is_on_host(leaf) else leaf, tree)


def placed_like(tree: Any, like: Any) -> Any:
    """Leaves moved to the host's memory where those of `like` are there."""
    return jax.tree.map(
        lambda leaf, old: jax.device_put(leaf, jax.memory.Space.Host) if _is_on_host(old) else leaf, tree, like
    )


def _is_on_host(leaf: Any) -> bool:
    return bool(jax.typeof(leaf).memory_space == jax.memory.Space.Host)
