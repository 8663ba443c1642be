"""Places host arrays on the mesh, and gives the shardings of everything that is not a weight."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.sharding.axes import BATCH_AXES
from jdpo.types import HOST_MEMORY


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [micro-batch, row, ...]: rows are split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays on the mesh; each process transfers only the shards of its own devices.

    Every process holds the same host arrays (batches follow from the step number alone), so no data travels
    between hosts.
    """
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index]), tree
    )


def fetch(tree: Any) -> Any:
    """Returns replicated or fully addressable device arrays as numpy arrays; works on every process."""
    # numpy cannot read an array with shards on other hosts; of a replicated one, every shard is the whole array.
    return jax.tree.map(
        lambda array: np.asarray(array.addressable_data(0) if not array.is_fully_addressable else array), tree
    )


def state_shardings(abstract_state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of an optimizer state: a leaf at a weight's path with its shape is split like that weight.

    Args:
      abstract_state: tree of ShapeDtypeStructs with subtrees like `params` (moments).
      params: tree of arrays or ShapeDtypeStructs.
      param_shardings: tree like `params`.
      mesh: device mesh; all other leaves are replicated (Adafactor's rows and columns are small).
    """
    # Moments have the tree of the weights; counts, scales and empty states do not.
    structure: Any = jax.tree.structure(params)  # jax's type of structures has no stubs

    def mirrors(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node) and structure.num_leaves > 0)

    def of_weights(node: Any) -> Any:
        return jax.tree.map(
            # Adafactor has trees like the weights whose leaves are rows, columns or placeholders of other shapes.
            lambda leaf, param, sharding: sharding if leaf.shape == param.shape else replicated(mesh),
            node,
            params,
            param_shardings,
        )

    # is_leaf stops at the root of every such tree, so that it is compared with the weights as a whole.
    return jax.tree.map(
        lambda node: of_weights(node) if mirrors(node) else replicated(mesh), abstract_state, is_leaf=mirrors
    )


def offloaded(shardings: Any, abstract_state: Any) -> Any:
    """Returns the shardings with host memory for all leaves except scalars; see `check_host_memory`.

    Args:
      shardings: tree of NamedShardings.
      abstract_state: tree like `shardings` of ShapeDtypeStructs or arrays.
    """
    return jax.tree.map(
        lambda sharding, leaf: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding,
        shardings,
        abstract_state,
    )


def check_host_memory(device: jax.Device, setting: str, instead: str) -> None:
    """Refuses a setting that uses the host's memory if a device cannot access it.

    Args:
      device: a device of this process.
      setting: the setting as in the config.
      instead: what to do instead, for the message.

    Raises:
      ValueError: the device cannot access it; the message names the device and the memory it has.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{setting} needs devices that can access {HOST_MEMORY} memory; {device.device_kind} ({device.platform}) "
            f"has {', '.join(kinds) or 'none with a name'}. {instead}"
        )


def on_device(tree: Any) -> Any:
    """Moves leaves from the host's memory to the device, within jit: arithmetic works only on the device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _is_on_host(leaf) else leaf, tree)


def placed_like(tree: Any, like: Any) -> Any:
    """Moves leaves to the host's memory if the same leaves of `like` are there."""
    return jax.tree.map(
        lambda leaf, old: jax.device_put(leaf, jax.memory.Space.Host) if _is_on_host(old) else leaf, tree, like
    )


def _is_on_host(leaf: Any) -> bool:
    return bool(jax.typeof(leaf).memory_space == jax.memory.Space.Host)
