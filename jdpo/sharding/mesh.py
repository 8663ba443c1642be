"""The device mesh: data x fsdp x expert x tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jdpo.config import MeshConfig
from jdpo.sharding.axes import AXES, BATCH_AXES, num_batch_shards
from jdpo.words import figure


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in the config's mesh; an axis of -1 takes the devices that the other axes leave.

    Args:
      config: sizes of the axes.
      devices: default: all devices of all processes.

    Returns:
      A mesh with the axes of AXES, all of type Auto.

    Raises:
      ValueError: the product of the sizes is not the number of devices; the message lists sizes that fit.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_mesh_shape(config, len(devices))
    # Not Mesh(...): on a TPU, make_mesh orders the devices so that neighbours along an axis are linked directly.
    # make_mesh would default to Explicit axes, under which every einsum must name its output's sharding.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def resolve_mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of AXES with -1 filled in.

    >>> resolve_mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8)
    (2, 2, 1, 2)
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {asked}: every axis must be at least 1, except that one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    # With a -1, the other sizes must divide the devices; without one, they must use all of them.
    fits = num_devices % fixed == 0 if free else num_devices == fixed
    if not fits:
        found = figure(num_devices, "device")
        raise ValueError(
            f"mesh {asked} does not fit the {found} found here; for {found} "
            f"these do, as {' x '.join(AXES)}: {_valid_shapes(num_devices, config.expert)}"
        )
    if free:
        sizes[free[0]] = num_devices // fixed
    return tuple(sizes.values())


def _valid_shapes(num_devices: int, asked_expert: int, most: int = 12) -> str:
    """Lists the shapes for a number of devices, with the config's expert axis if it divides that number."""
    # The size of this axis depends on the model's number of experts, so the user's own is kept.
    expert = asked_expert if asked_expert > 0 and num_devices % asked_expert == 0 else 1
    others = num_devices // expert
    divisors = [n for n in range(1, others + 1) if others % n == 0]
    shapes = [
        f"{data}x{fsdp}x{expert}x{others // (data * fsdp)}"
        for data, fsdp in itertools.product(divisors, repeat=2)
        if others % (data * fsdp) == 0
    ]
    return ", ".join(shapes[:most]) + (", ..." if len(shapes) > most else "")


def check_batch_size(global_batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh cannot split evenly.

    Raises:
      ValueError: the mesh cannot split it; the message lists the nearest batch sizes that it can split.
    """
    shards = num_batch_shards(mesh)
    if global_batch_size % shards:
        below = global_batch_size // shards * shards
        choices = [size for size in (below, below + shards, below + 2 * shards) if size]
        sizes = " x ".join(str(mesh.shape[axis]) for axis in BATCH_AXES)
        raise ValueError(
            f"global_batch_size {global_batch_size} does not split over {' x '.join(BATCH_AXES)} = {sizes} = {shards} "
            f"shards; use a multiple of {shards}, such as {', '.join(map(str, choices))}, or a mesh with a larger "
            "tensor axis"
        )
