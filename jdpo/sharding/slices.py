"""The slices of the devices: TPU slices, or nodes of GPUs, which the network of the data centre joins."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import jax

from jdpo.words import figure


def count_slices(
    devices: Sequence[jax.Device], asked: int | None = None, environ: Mapping[str, str] = os.environ
) -> int:
    """Returns the number of slices that a mesh of these devices has: that of the devices, or the one asked for.

    A TPU slice is what it is, so a number only checks it. Nodes of GPUs may be taken together, as their network may be
    fast enough for weights, and devices that belong to no slice are divided into equal runs of neighbours.

    Args:
      asked: `mesh.slices` of a config; None: as many as the devices have.
      environ: the environment of this process, whose MEGASCALE_NUM_SLICES must agree with a TPU's devices.

    Raises:
      ValueError: the devices cannot be divided like this.
    """
    sizes = slice_sizes(devices)
    found = len(sizes)
    if len(set(sizes.values())) > 1:
        held = ", ".join(f"slice {index} has {size}" for index, size in sizes.items())
        raise ValueError(f"all slices of a mesh must have equally many devices, but {held}")
    if devices[0].platform == "tpu":
        named = environ.get("MEGASCALE_NUM_SLICES", "").strip()
        # Devices that are picked by hand, such as a single one, may be some of all slices.
        if named.isdecimal() and len(devices) == jax.device_count() and int(named) != found:
            raise ValueError(
                f"MEGASCALE_NUM_SLICES is {named}, but the devices of this run are in {figure(found, 'slice')}: start "
                "the processes of every slice, and give all of them the same number"
            )
        if asked not in (None, found):
            raise ValueError(
                f"mesh.slices {asked}: the devices are in {figure(found, 'slice')} of {len(devices) // found}; leave "
                "mesh.slices out, or start the run on as many slices as it names"
            )
        return found
    if asked is None:
        return found
    if len(devices) % asked or (found > 1 and found % asked):
        whole = f"{figure(len(devices), 'device')}" + (f" on {found} nodes" if found > 1 else "")
        raise ValueError(f"mesh.slices {asked} does not divide the {whole} of this run into equal parts")
    return asked


def slice_sizes(devices: Sequence[jax.Device]) -> dict[int, int]:
    """Returns the number of devices by `slice_index`, in its order; devices without one are in slice 0."""
    # Devices of CPUs have none, nor those of some platforms with a single slice.
    counts = Counter(getattr(device, "slice_index", None) or 0 for device in devices)
    return dict(sorted(counts.items()))
