"""Gradients of kernels that are sharded over several mesh axes, summed over one axis after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jdpo.models.mesh_axes import automatic_mesh, mesh_axes, num_devices, weight_axes


def kernel_gradient(equation: str, x: jax.Array, cotangent: jax.Array, embed_dim: int | None) -> jax.Array:
    """Computes the gradient of a kernel, the einsum of x and a cotangent, whose first axes are both the sequences.

    If the mesh in context shards kernel and batch over several axes, each device sums its own product over one axis
    after the other, and keeps its own part. Left to itself, XLA sums over all of them at once, for which libtpu knows
    no reduce-scatter where they are 16 chips or more: it all-reduces, which moves twice as much.

    Args:
      embed_dim: dim of the result with the logical axis "embed"; None if it has none.
    """
    product, mesh = jnp.einsum, automatic_mesh()
    if embed_dim is None or mesh is None:
        return product(equation, x, cotangent)
    size = jax.eval_shape(lambda: product(equation, x, cotangent)).shape[embed_dim]
    split = weight_axes(mesh, "embed", size)
    batch = tuple(axis for axis in mesh_axes("batch") if mesh.shape[axis] > 1)
    if len(split) < 2 or not set(split) <= set(batch) or x.shape[0] % num_devices(mesh, batch):
        return product(equation, x, cotangent)

    def on_device(x: jax.Array, cotangent: jax.Array) -> Any:
        gradient = product(equation, x, cotangent)
        for axis in split:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=embed_dim, tiled=True)
        # Over copies of the weights last, as by now only a part is left.
        copies = tuple(axis for axis in batch if axis not in split)
        return jax.lax.psum(gradient, copies) if copies else gradient

    by_sequence = PartitionSpec(batch)
    gradient: jax.Array = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(by_sequence, by_sequence),
        out_specs=PartitionSpec(*[None] * embed_dim, split),
        axis_names=set(batch),
    )(x, cotangent)
    return gradient
