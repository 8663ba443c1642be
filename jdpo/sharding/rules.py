"""Maps logical axis names of weights and activations to mesh axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.sharding.axes import BATCH_AXES

LOGICAL_RULES: tuple[tuple[str, Any], ...] = (
    # weights: fsdp splits the model dimension, tensor splits heads, mlp and vocabulary
    ("vocab", "tensor"),
    ("embed", ("fsdp", "expert")),  # for weights that are not experts, the expert axis is one more fsdp axis
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("expert_embed", "fsdp"),  # the expert axis already splits these by number of experts
    ("expert_mlp", "tensor"),
    ("head_dim", None),  # rope and attention need whole heads
    ("norm", None),  # small vectors: gathering them would cost more than it saves
    ("positions", None),
    ("layers", None),  # the axis that lax.scan runs over
    # activations: fsdp and expert split the batch, so the model dimension stays whole
    ("batch", BATCH_AXES),
    ("act_length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_head_dim", None),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)
"""Rules in the form that flax.linen.logical_axis_rules takes."""


def rules_without(axis: str) -> tuple[tuple[str, Any], ...]:
    """Returns LOGICAL_RULES without a mesh axis, for code within a shard_map over that axis."""

    def left(axes: Any) -> Any:
        return (
            tuple(each for each in axes if each != axis) if isinstance(axes, tuple) else axes if axes != axis else None
        )

    return tuple((name, left(axes)) for name, axes in LOGICAL_RULES)


def partition_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the mesh axes that split an array's dims: the longest prefix of each rule's axes that divides the dim.

    Raises:
      KeyError: a logical name has no rule.
    """
    rules = dict(LOGICAL_RULES)
    axes = [None if name is None else rules[name] for name in names]
    return PartitionSpec(*(_dividing(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _dividing(axis: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """Returns the longest prefix of the axes whose product divides `size`; None if it is empty."""
    if axis is None or isinstance(axis, str):
        return axis if axis and size % mesh.shape[axis] == 0 else None
    # Dropping axes from the end keeps as much of the split as the dim allows: 8 over fsdp=4 x expert=3 is split by 4.
    first = next((axis[:n] for n in range(len(axis), 0, -1) if size % mesh_axis_size(mesh, axis[:n]) == 0), ())
    return first[0] if len(first) == 1 else first or None


def mesh_axis_size(mesh: Mesh, axis: str | Sequence[str]) -> int:
    """Returns the number of devices along one mesh axis, or along several of them."""
    size = 1
    for name in (axis,) if isinstance(axis, str) else axis:
        size *= mesh.shape[name]
    return size


def param_shardings(logical_axes: Any, abstract_params: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every weight.

    Args:
      logical_axes: tree of tuples of logical names, one name per dim.
      abstract_params: tree of arrays or ShapeDtypeStructs of the same structure.
      mesh: the device mesh.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)),
        abstract_params,
        logical_axes,
    )


def undivided_dims(logical_axes: Any, abstract_params: Any, mesh: Mesh) -> list[str]:
    """Lists, for the log, the weights with a dim that a rule would split but the mesh does not divide."""
    rules = dict(LOGICAL_RULES)
    found: list[str] = []

    def visit(path: Any, leaf: Any, names: Sequence[str | None]) -> None:
        for name, size in zip(names, leaf.shape, strict=True):
            axis = rules[name] if name else None
            used = _dividing(axis, size, mesh)
            # An axis of size 1 splits nothing, so it is never reported.
            if axis and mesh_axis_size(mesh, axis) > mesh_axis_size(mesh, used or ()):
                but = f" (split over {used} alone)" if used else ""
                place = f"{jax.tree_util.keystr(path)}: {name}={size}"
                found.append(f"{place} over {axis}={mesh_axis_size(mesh, axis)}{but}")

    jax.tree_util.tree_map_with_path(visit, abstract_params, logical_axes)
    return found
