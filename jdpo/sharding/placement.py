"""Host arrays onto the mesh, and the shardings of what is not a weight."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.sharding.mesh import BATCH_AXES


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
    """Shardings of an optimizer state: its leaves under a weight's path and shape are split as that weight.

    Args:
      abstract_state: tree of ShapeDtypeStructs, with subtrees that mirror `params` (moments).
      params: tree of arrays or ShapeDtypeStructs.
      param_shardings: tree like `params`.
      mesh: the device mesh; all other leaves are replicated.
    """
    structure = jax.tree.structure(params)

    def mirrors(node: Any) -> bool:
        return jax.tree.structure(node) == structure and structure.num_leaves > 0

    return jax.tree.map(
        lambda node: param_shardings if mirrors(node) else replicated(mesh), abstract_state, is_leaf=mirrors
    )
