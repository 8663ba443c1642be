"""The axes of the device mesh: data x fsdp x expert x tensor."""

from __future__ import annotations

import math

from jax.sharding import Mesh

# By how much they communicate, least first: jax.make_mesh gives the last axes the fastest links of a TPU.
AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
"""Axes that split a batch; the devices along `tensor` share its rows."""

COPIES_AXIS = "data"
"""The axis whose devices hold copies of the weights; it alone goes across slices."""


def num_batch_shards(mesh: Mesh) -> int:
    """Returns how many parts a batch is split into: the product of BATCH_AXES."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
