"""Devices that are neither here nor known to an installed compiler: enough to lay out a run on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.config import TrainConfig
from jdpo.planning.machines import Machine
from jdpo.training.fit.compiler_options import OPTIONS


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """The attributes of a `jax.Device` that a mesh, shardings and estimates read."""

    id: int
    device_kind: str
    platform: str
    slice_index: int
    process_index: int


def absent_devices(machine: Machine) -> list[Any]:
    """Returns stand-ins for the devices of a machine."""
    platform = machine.target.platform
    return [
        AbsentDevice(
            number, machine.kind, platform, number // machine.devices_per_slice, number // machine.devices_per_host
        )
        for number in range(machine.num_devices)
    ]


def without_compiler_options(config: TrainConfig) -> TrainConfig:
    """Returns the config without options of the compiler, which are tried on the compiler of real devices."""
    return dataclasses.replace(
        config, compiler_options={name: None for of_kind in OPTIONS.values() for name in of_kind}
    )
