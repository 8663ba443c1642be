"""Names of the machines that programs are compiled for, such as v5e-64, 2xv5e-16 and h100x8."""

from __future__ import annotations

import dataclasses
import math
import re

from jdpo.chips import Chip, chip_of
from jdpo.devices import Target
from jdpo.words import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that programs are compiled for.

    Attributes:
      name: as the user gives it.
      kind: `jax.Device.device_kind` of its devices.
      topology: of a TPU slice, as libtpu names it ("v5e:4x4"); of GPUs, slices x nodes x GPUs of a node.
      torus: chips of a slice along each axis of its torus; of a node of GPUs, their number.
      slices: TPU slices, or nodes of GPUs: what is joined by the network of the data centre.
      devices_per_slice: JAX devices of each.
    """

    name: str
    kind: str
    topology: str
    torus: tuple[int, ...]
    slices: int
    devices_per_slice: int

    @property
    def num_devices(self) -> int:
        """All JAX devices."""
        return self.slices * self.devices_per_slice

    @property
    def chip(self) -> Chip:
        """The row of its devices in the table of chips."""
        chip = chip_of(self.kind)
        assert chip is not None, self.kind
        return chip

    @property
    def target(self) -> Target:
        """What code that chooses by platform is told."""
        return Target("gpu", _CAPABILITY) if self.is_gpu else Target("tpu")

    @property
    def is_gpu(self) -> bool:
        """True for GPUs, False for TPUs."""
        return self.kind.startswith("NVIDIA")

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each axis of the torus, True if its last chip is linked to its first."""
        # v5e and v6e close an axis of a whole pod, 16 chips; the others axes of whole cubes of 4 x 4 x 4.
        if len(self.torus) == 2:
            return tuple(size == 16 for size in self.torus)
        return tuple(size % 4 == 0 and min(self.torus) >= 4 for size in self.torus)


_CAPABILITY = "9.0"
"""The compute capability of Hopper GPUs."""

_Slices = dict[int, tuple[int, ...]]
_SQUARES: _Slices = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES: _Slices = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
"""Chips -> the slice of that many that Google offers."""

_TPUS: dict[str, tuple[str, _Slices, int, int]] = {
    # version -> device kind, slices, what the number in a name counts per chip, devices per chip
    "v5e": ("TPU v5 lite", _SQUARES, 1, 1),
    "v5p": ("TPU v5p", _CUBES, 2, 1),  # names count TensorCores: v5p-64 has 32 chips, and as many devices
    "v6e": ("TPU v6 lite", _SQUARES, 1, 1),
    "tpu7x": ("TPU7x", _CUBES, 2, 2),
}

_GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_GPUS_OF_NODE = 8


def machine_of(name: str) -> Machine:
    """Returns the machine of a name: v5e-8 to -256, v5p-8 to -256, v6e-*, tpu7x-*, 2xv5e-16, h100x8, h200.

    Raises:
      ValueError: there is no such machine; near names are listed.

    >>> machine_of("v5p-64").topology, machine_of("2xv5e-16").num_devices, machine_of("h100x16").slices
    ('v5p:2x4x4', 32, 2)
    """
    tpu = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name)
    if tpu and tpu.group(2) in _TPUS:
        kind, sizes, counted, per_chip = _TPUS[tpu.group(2)]
        torus = sizes.get(int(tpu.group(3)) // counted) if int(tpu.group(3)) % counted == 0 else None
        slices = int(tpu.group(1) or 1)
        if torus is not None and slices:
            return Machine(
                name=name,
                kind=kind,
                topology=f"{tpu.group(2)}:{'x'.join(map(str, torus))}",
                torus=torus,
                slices=slices,
                devices_per_slice=math.prod(torus) * per_chip,
            )
    gpu = re.fullmatch(r"([a-z]\w*?\d)(?:x(\d+))?", name)
    if gpu and gpu.group(1) in _GPUS:
        number = int(gpu.group(2) or 1)
        nodes, rest = divmod(number, _GPUS_OF_NODE)
        if number and (number < _GPUS_OF_NODE or not rest):
            nodes = max(nodes, 1)
            return Machine(
                name=name,
                kind=_GPUS[gpu.group(1)],
                topology=f"1x{nodes}x{number // nodes}",
                torus=(number // nodes,),
                slices=nodes,
                devices_per_slice=number // nodes,
            )
    raise ValueError(_unknown(name))


def machine_names() -> list[str]:
    """Returns the names of single slices and of up to eight GPUs."""
    tpus = [f"{version}-{chips * counted}" for version, (_, sizes, counted, _) in _TPUS.items() for chips in sizes]
    return tpus + [f"{gpu}x{number}" for gpu in _GPUS for number in (1, 2, 4, 8)]


def _unknown(name: str) -> str:
    known = machine_names()
    versions = [known_name for known_name in known if known_name.split("-")[0] == name.split("-")[0].split("x", 1)[-1]]
    suggestion = did_you_mean(name, known)
    return " ".join(
        part
        for part in (
            f"unknown target {name!r}:",
            suggestion,
            f"expected one of {', '.join(versions or known)}, several slices of one (2xv5e-16), or nodes of 8 GPUs "
            "(h100x16)",
        )
        if part
    )
