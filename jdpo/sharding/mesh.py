"""The device mesh: data x fsdp x expert x tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jdpo.config import MeshConfig
from jdpo.sharding.axes import AXES, BATCH_AXES, num_batch_shards
from jdpo.sharding.slices import count_slices, slice_sizes
from jdpo.words import figure


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in the config's mesh; an axis of -1 takes the devices that the other axes leave.

    On several slices `data` is the outermost axis across them, and all other axes stay within a slice.

    Args:
      config: sizes of the axes, and the number of slices.
      devices: default: all devices of all processes.

    Returns:
      A mesh with the axes of AXES, all of type Auto.

    Raises:
      ValueError: the devices cannot be laid out like this; the message lists sizes that fit.
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices, config.slices)
    shape = resolve_mesh_shape(config, len(devices), slices)
    # Otherwise axes would be Explicit, under which every einsum must name its output's sharding.
    types = (AxisType.Auto,) * len(AXES)
    found = len(slice_sizes(devices))
    if found == 1:
        # Not Mesh(...): on a TPU, make_mesh orders the devices so that neighbours along an axis are linked directly.
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if found == slices:
        return Mesh(_across_slices(shape, slices, devices), AXES, axis_types=types)
    # Nodes of GPUs that are taken together: neighbours along the last axes are in one node.
    in_order = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return Mesh(np.asarray(in_order, object).reshape(shape), AXES, axis_types=types)


def _across_slices(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices so that `data` goes across slices first; within each they are ordered as `make_mesh` does."""
    data, *others = shape
    across = (slices, *(1 for _ in others))
    # As jax.make_mesh decides it: only there does a mesh need an axis of the torus divided over two of its own.
    divides_torus = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    arranged: np.ndarray = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others), across, devices, allow_split_physical_axes=divides_torus
    )
    return arranged


def resolve_mesh_shape(config: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, ...]:
    """Returns the sizes of AXES with -1 filled in; on several slices `data` is a multiple of their number.

    A `data` of 1, its default, becomes one copy of the weights per slice, see docs/decisions/0019.

    >>> resolve_mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8)
    (2, 2, 1, 2)
    >>> resolve_mesh_shape(MeshConfig(data=1, fsdp=-1), 8, num_slices=2)
    (2, 4, 1, 1)
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {asked}: every axis must be at least 1, except that one axis may be -1")
    if sizes["data"] == 1:
        sizes["data"] = num_slices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    # With a -1, the other sizes must divide the devices; without one, they must use all of them.
    fits = num_devices % fixed == 0 if free else num_devices == fixed
    if fits and free:
        sizes[free[0]] = num_devices // fixed
    if not fits or sizes["data"] % num_slices:
        found = figure(num_devices, "device")
        in_slices = (
            f", in {num_slices} slices of {num_devices // num_slices}: along data a mesh goes across slices, and the "
            "other axes stay within one"
            if num_slices > 1
            else ""
        )
        raise ValueError(
            f"mesh {asked} does not fit the {found}{in_slices}; for {found} "
            f"these do, as {' x '.join(AXES)}: {_valid_shapes(num_devices, config.expert, num_slices)}"
        )
    return tuple(sizes.values())


def _valid_shapes(num_devices: int, asked_expert: int, num_slices: int = 1, most: int = 12) -> str:
    """Lists the shapes for a number of devices, with the config's expert axis if it divides that of a slice."""
    # The size of this axis depends on the model's number of experts, so the user's own is kept.
    expert = asked_expert if asked_expert > 0 and num_devices // num_slices % asked_expert == 0 else 1
    others = num_devices // expert
    divisors = [n for n in range(1, others + 1) if others % n == 0]
    shapes = [
        f"{data}x{fsdp}x{expert}x{others // (data * fsdp)}"
        for data, fsdp in itertools.product(divisors, repeat=2)
        if others % (data * fsdp) == 0 and data % num_slices == 0
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
