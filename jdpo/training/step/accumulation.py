"""Gradients of a global batch, summed over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jdpo.models.mesh_axes import automatic_mesh
from jdpo.sharding.axes import COPIES_AXIS
from jdpo.sharding.rules import rules_without
from jdpo.training.step.rounding import wide

Params = Any


def accumulate(
    grads_of: Callable[[Params, Any], tuple[Params, Any]], params: Params, micros: Any
) -> tuple[Params, Any]:
    """Sums gradients over micro-batches, in float32 or wider, and stacks what else each of them gives.

    Where several devices hold copies of the weights, each sums the gradients of its own rows, and these sums are added
    up over the copies once, after the last micro-batch: little is sent across slices, however many micro-batches there
    are.

    Args:
      grads_of: (params, micro-batch [m, ...]) -> gradients like `params`, and arrays of one item per row, or of one per
        part of the rows.
      micros: arrays [k, m, ...], m split over the batch axes of the mesh in context.
    """
    mesh = automatic_mesh()
    if mesh is None or mesh.shape.get(COPIES_AXIS, 1) == 1:
        return _sums(grads_of, params, micros)

    def of_copy(params: Params, micros: Any) -> tuple[Params, Any]:
        # Within, rows are those of one copy, which the other batch axes split.
        with nn.logical_axis_rules(rules_without(COPIES_AXIS)):
            grads, others = _sums(grads_of, params, micros)
        return jax.lax.psum(grads, COPIES_AXIS), others

    by_row = PartitionSpec(None, COPIES_AXIS)
    over_copies = jax.shard_map(
        of_copy,
        mesh=mesh,
        in_specs=(PartitionSpec(), by_row),
        out_specs=(PartitionSpec(), by_row),
        axis_names={COPIES_AXIS},
        # Off: with the check, the gradient of a weight would be summed over the copies wherever it is used.
        check_vma=False,
    )
    return over_copies(params, micros)


def _sums(grads_of: Callable[[Params, Any], tuple[Params, Any]], params: Params, micros: Any) -> tuple[Params, Any]:
    def step(total: Params, micro: Any) -> tuple[Params, Any]:
        grads, other = grads_of(params, micro)
        return jax.tree.map(jnp.add, total, wide(grads)), other

    # In float32 or wider: a sum in bfloat16 loses whatever is below 0.4 % of it.
    return jax.lax.scan(step, wide(jax.tree.map(jnp.zeros_like, params)), micros)
