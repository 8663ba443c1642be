"""Looks up mesh axes by the logical rules in context."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec


def mesh_axes(logical_name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which the rules in context split a logical axis."""
    axes = nn.logical_to_mesh_axes((logical_name,))[0]
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def automatic_mesh() -> Any:
    """Returns the mesh in context if XLA decides what is where along axes of it with several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    # Within a shard_map over all axes, or over explicit ones, the caller has decided. Of a shard_map over some of them,
    # such as that over slices, the rules in context name the others.
    if mesh.empty or mesh.size == 1 or AxisType.Explicit in mesh.axis_types:
        return None
    return mesh if AxisType.Auto in mesh.axis_types else None


def num_devices(mesh: Any, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along several mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def sequence_and_head_axes(mesh: Any, num_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes that split sequences, and those that split key heads.

    Heads that the mesh does not divide evenly are replicated.
    """
    batch_axes, head_axes = (mesh_axes(name) for name in ("batch", "act_kv_heads"))
    return batch_axes, () if num_heads % num_devices(mesh, head_axes) else head_axes


def weight_axes(mesh: Any, logical_name: str | None, size: int) -> tuple[str, ...]:
    """Returns the axes that split a weight's dim: the longest prefix of the rule's that divides it, without axes of 1.

    Weights are placed by the same rule, see `jdpo.sharding.rules.partition_spec`.
    """
    axes = () if logical_name is None else mesh_axes(logical_name)
    dividing = next(axes[:n] for n in range(len(axes), -1, -1) if size % num_devices(mesh, axes[:n]) == 0)
    return tuple(axis for axis in dividing if mesh.shape[axis] > 1)


def constrain_weight(weight: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Keeps a weight, and its gradient, split as it is stored; without a mesh of several devices it does nothing."""
    mesh = automatic_mesh()
    sizes = zip(names, weight.shape, strict=True)
    axes = [] if mesh is None else [weight_axes(mesh, name, size) for name, size in sizes]
    # Without rules nothing is said about any dim, and XLA remains free.
    if not any(axes):
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*(of_dim or None for of_dim in axes)))
