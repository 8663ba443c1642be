"""Names of the machines that programs are compiled for, such as v5e-64, 2xv5e-16 and h100x8."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from jdpo.chips import Chip, chip_of
from jdpo.planning.near_names import near_name

if TYPE_CHECKING:  # jdpo.devices loads jax, which names do not need
    from jdpo.devices import Target


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
    def chips(self) -> int:
        """All chips: TPU chips, of which one may be two devices, or GPUs."""
        return self.slices * math.prod(self.torus)

    @property
    def num_hosts(self) -> int:
        """All hosts, each of which runs one process: TPU VMs, or nodes of GPUs."""
        return self.slices * self.hosts_per_slice

    @property
    def hosts_per_slice(self) -> int:
        """The hosts of a slice; a node of GPUs is one."""
        chips = math.prod(self.torus)
        if self.is_gpu or chips <= self._tpu.chips_of_one_host:
            return 1
        return chips // _CHIPS_OF_A_HOST

    @property
    def devices_per_host(self) -> int:
        """The JAX devices of a host."""
        return self.devices_per_slice // self.hosts_per_slice

    @property
    def chips_per_host(self) -> int:
        """The chips of a host, which is what Kubernetes counts (`google.com/tpu`, `nvidia.com/gpu`)."""
        return math.prod(self.torus) // self.hosts_per_slice

    @property
    def gcloud_type(self) -> str | None:
        """The `--accelerator-type` of a slice in `gcloud compute tpus`; None if it is not rented there."""
        if self.is_gpu or self._tpu.gcloud is None:
            return None
        return f"{self._tpu.gcloud}-{math.prod(self.torus) * self._tpu.counted}"

    @property
    def tpu_software(self) -> str | None:
        """The `--runtime-version` of a TPU VM, the image of its disk; None if `gcloud_type` is None."""
        return None if self.is_gpu else self._tpu.software

    @property
    def gke_accelerator(self) -> str:
        """The node label `cloud.google.com/gke-tpu-accelerator`, or `gke-accelerator` of GPUs."""
        return _gpu(self.kind).gke_accelerator if self.is_gpu else self._tpu.gke_accelerator

    @property
    def gke_topology(self) -> str | None:
        """The node label `cloud.google.com/gke-tpu-topology` of a slice, such as 4x4; None for GPUs."""
        return None if self.is_gpu else "x".join(map(str, self.torus))

    @property
    def version(self) -> str:
        """The name without counts: v5e, v5p, v6e, tpu7x, h100 or h200."""
        return next(name for name, row in (_TPUS | _GPUS).items() if row.kind == self.kind)

    @property
    def _tpu(self) -> _Tpu:
        return _TPUS[self.version]

    @property
    def chip(self) -> Chip:
        """The row of its devices in the table of chips."""
        chip = chip_of(self.kind)
        assert chip is not None, self.kind
        return chip

    @property
    def target(self) -> Target:
        """Its platform, for code that chooses by platform."""
        from jdpo.devices import Target

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
_CUBES: _Slices = {
    **{4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)},
    **{128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8)},
}
"""Chips -> the slice of that many that Google offers."""


class _Tpu(NamedTuple):
    """A version of the TPU.

    Attributes:
      kind: `jax.Device.device_kind`.
      slices: chips -> torus.
      counted: what the number in a name counts per chip: chips, or TensorCores, of which there are two.
      devices_per_chip: JAX devices.
      chips_of_one_host: the largest slice that is a single host; hosts of larger ones have `_CHIPS_OF_A_HOST`.
      gcloud: the name before the number of an accelerator type, or None.
      software: the image of a TPU VM, or None.
      gke_accelerator: a node label.
    """

    kind: str
    slices: _Slices
    counted: int
    devices_per_chip: int
    chips_of_one_host: int
    gcloud: str | None
    software: str | None
    gke_accelerator: str


# Hosts and names: https://cloud.google.com/tpu/docs (the page of each version) and
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. The hosts that they count are VMs here.
_TPUS: dict[str, _Tpu] = {
    "v5e": _Tpu("TPU v5 lite", _SQUARES, 1, 1, 8, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    # names count TensorCores: v5p-64 has 32 chips, and as many devices
    "v5p": _Tpu("TPU v5p", _CUBES, 2, 1, 4, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": _Tpu("TPU v6 lite", _SQUARES, 1, 1, 8, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": _Tpu("TPU7x", _CUBES, 2, 2, 4, None, None, "tpu7x"),
}
_CHIPS_OF_A_HOST = 4
"""Chips of each host of a slice of several hosts, of every version."""


class _Gpu(NamedTuple):
    """A GPU: `jax.Device.device_kind`, and its node label on GKE."""

    kind: str
    gke_accelerator: str


_GPUS: dict[str, _Gpu] = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb"),
    "h200": _Gpu("NVIDIA H200", "nvidia-h200-141gb"),
}
GPUS_OF_NODE = 8
_MOST_SLICES = 1024
"""Slices of TPUs or nodes of GPUs. Larger numbers are slips, and their plans would take hours."""


def _gpu(kind: str) -> _Gpu:
    return next(row for row in _GPUS.values() if row.kind == kind)


def machine_of(name: str) -> Machine:
    """Returns the machine of a name: v5e-8 to -256, v5p-8 to -256, v6e-*, tpu7x-*, 2xv5e-16, h100x8, h200.

    Raises:
      ValueError: there is no such machine; near names are listed.

    >>> machine_of("v5p-64").topology, machine_of("2xv5e-16").num_devices, machine_of("h100x16").slices
    ('v5p:2x4x4', 32, 2)
    """
    machine = _find(name)
    if machine is None:
        raise ValueError(_unknown(name))
    return machine


def _find(name: str) -> Machine | None:
    tpu = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name)
    if tpu and (row := _TPUS.get(tpu.group(2))):
        torus = row.slices.get(int(tpu.group(3)) // row.counted) if int(tpu.group(3)) % row.counted == 0 else None
        slices = int(tpu.group(1) or 1)
        if torus is not None and 0 < slices <= _MOST_SLICES:
            return Machine(
                name=name,
                kind=row.kind,
                topology=f"{tpu.group(2)}:{'x'.join(map(str, torus))}",
                torus=torus,
                slices=slices,
                devices_per_slice=math.prod(torus) * row.devices_per_chip,
            )
    gpu = re.fullmatch(r"([a-z]\w*?\d)(?:x(\d+))?", name)
    if gpu and gpu.group(1) in _GPUS:
        number = int(gpu.group(2) or 1)
        nodes, rest = divmod(number, GPUS_OF_NODE)
        if number and (number < GPUS_OF_NODE or not rest) and nodes <= _MOST_SLICES:
            nodes = max(nodes, 1)
            return Machine(
                name=name,
                kind=_GPUS[gpu.group(1)].kind,
                topology=f"1x{nodes}x{number // nodes}",
                torus=(number // nodes,),
                slices=nodes,
                devices_per_slice=number // nodes,
            )
    return None


def machine_names() -> list[str]:
    """Returns the names of single slices and of up to eight GPUs."""
    tpus = [f"{version}-{chips * row.counted}" for version, row in _TPUS.items() for chips in row.slices]
    return tpus + [f"{gpu}x{number}" for gpu in _GPUS for number in (1, 2, 4, 8)]


def versions() -> list[str]:
    """Returns the names without counts: v5e, v5p, v6e, tpu7x, h100, h200."""
    return [*_TPUS, *_GPUS]


def _unknown(name: str) -> str:
    known = machine_names()
    near = near_name(name, known)
    version = re.sub(r"^\d+x|-\d+$|x\d+$", "", near or name)
    if near and _find(near) is None:
        near = None  # next to a number that is too large is another one
    alike = [found for found in known if re.sub(r"-\d+$|x\d+$", "", found) == version]
    return " ".join(
        part
        for part in (
            f"unknown machine {name!r}:",
            f"did you mean {near}?" if near else "",
            f"expected one of {', '.join(alike or known)}, several slices of one (2xv5e-16), or nodes of "
            f"{GPUS_OF_NODE} GPUs (h100x16), of either at most {_MOST_SLICES:,}",
        )
        if part
    )
