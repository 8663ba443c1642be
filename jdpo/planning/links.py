"""The links between the devices of a machine, and how long collectives take on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jdpo.planning.hlo.collectives import Collective
from jdpo.planning.machines import Machine


class Place(NamedTuple):
    """Where a device is.

    Attributes:
      slice_index: of its slice or node.
      coordinates: in the torus of its slice; empty in a node of GPUs, which are all linked to each other.
    """

    slice_index: int
    coordinates: tuple[int, ...]


class Links(NamedTuple):
    """Bytes per second, in one direction.

    Attributes:
      link: of one link to a neighbour; of a GPU, to the others of its node together.
      across: of a device's share of the network between slices or nodes.
      wraps: for each axis of the torus, True if it closes to a ring.
    """

    link: float
    across: float
    wraps: tuple[bool, ...]

    def within(self, group: Sequence[Place]) -> float:
        """Returns the bytes per second that a device of a group sends within its slice."""
        first = group[0]
        axes = [
            axis
            for axis in range(len(first.coordinates))
            if len({place.coordinates[axis] for place in group if place.slice_index == first.slice_index}) > 1
        ]
        # A GPU, or two cores of one chip.
        if not axes:
            return self.link
        return sum(self.link * (2 if self.wraps[axis] else 1) for axis in axes)


def links_of(machine: Machine) -> Links:
    """Returns the links of a machine, from the table of chips."""
    chip = machine.chip
    return Links(chip.link, chip.across, machine.wraps)


def places_of(machine: Machine, devices: Sequence[Any]) -> tuple[Place, ...]:
    """Returns where each device is.

    Args:
      devices: of a mesh, in its order, which is that of the numbers in the program.
    """
    if machine.is_gpu:
        return tuple(Place(device.id // machine.devices_per_slice, ()) for device in devices)
    return tuple(Place(getattr(device, "slice_index", 0) or 0, tuple(device.coords)) for device in devices)


def link_seconds(collective: Collective, places: Sequence[Place], links: Links) -> float:
    """Returns the time of a collective on links that carry nothing else.

    Within a slice or node all links along the axes that a group spans are used, in both directions where the axis
    closes to a ring, in one where it ends; a permutation uses one link. Between slices each device sends its share of
    what the others need.

    Args:
      places: of each device of the program.
    """
    group = [places[int(device)] for device in collective.groups[0]]
    slices = len({place.slice_index for place in group})
    size = len(group)
    if collective.kind == "collective-permute":
        crossing = any(
            places[int(source)].slice_index != places[int(target)].slice_index for source, target in collective.groups
        )
        return collective.num_bytes / (links.across if crossing else links.link)
    if size == 1:
        return 0
    times = 2 if collective.kind == "all-reduce" else 1
    within = size // slices
    seconds = 0.0
    if within > 1:
        seconds += times * collective.num_bytes * (within - 1) / within / links.within(group)
    if slices > 1:
        seconds += times * collective.num_bytes * (slices - 1) / slices / within / links.across
    return seconds


def split_wire_bytes(collective: Collective, places: Sequence[Place]) -> tuple[float, float]:
    """Returns the bytes that each device sends within its slice, and to other slices; they add up to `wire_bytes`.

    As `link_seconds` has it: within a slice first, and then each device's share between slices.

    Args:
      places: of each device of the program.
    """
    if collective.kind == "collective-permute":
        crossing = sum(
            places[int(source)].slice_index != places[int(target)].slice_index for source, target in collective.groups
        )
        across = collective.num_bytes * crossing / len(collective.groups)
        return collective.wire_bytes - across, across
    group = [places[int(device)] for device in collective.groups[0]]
    slices = len({place.slice_index for place in group})
    times = 2 if collective.kind == "all-reduce" else 1
    across = times * collective.num_bytes * (slices - 1) / len(group)
    return collective.wire_bytes - across, across
