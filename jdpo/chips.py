"""One table of accelerator chips: peak FLOP/s, memory and links, by the manufacturers' data sheets."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

GOOGLE = "https://cloud.google.com/tpu/docs: system architecture, and the page of each version, such as v5e"
V100 = "NVIDIA V100 datasheet, January 2020"
A100 = "NVIDIA A100 datasheet, June 2021; A10 and L4 datasheets; Ada GPU architecture whitepaper (RTX 4090)"
H100 = "NVIDIA H100, H200 and H100 NVL datasheets; DGX H100 and H200 user guides (eight 400 Gb/s adapters per node)"
B200 = "NVIDIA DGX B200 datasheet"


GPU_POOL = 0.92
"""The share of a GPU's memory that JAX reserves for a run of the command; its own default is 0.75. The rest is for what
CUDA, NCCL and cuDNN allocate next to the pool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A device as JAX counts them: a chip, or one of the two TensorCores of a TPU v2, v3 and TPU7x.

    Speeds are for one direction. nan where nothing needs them yet.

    Attributes:
      kinds: a pattern of `jax.Device.device_kind`.
      tera_flops: dense TFLOP/s by the dtype of the operands, accumulated in float32; float32 by plain cores, not as
        TF32. TPUs multiply float32 in several bfloat16 products, for which there is no figure.
      hbm_bytes: memory that a program can use.
      hbm_bandwidth: bytes per second.
      link: bytes per second of one link to a neighbour in a TPU slice, of which there are two along each axis of the
        torus; of a GPU, to all others of its node together.
      across: bytes per second of a device's share of the network between slices or nodes.
      source: where the figures are from.
    """

    kinds: str
    tera_flops: Mapping[str, float]
    hbm_bytes: float = math.nan
    hbm_bandwidth: float = math.nan
    link: float = math.nan
    across: float = math.nan
    source: str

    def peak(self, dtype: str) -> float | None:
        """Returns the dense FLOP/s for operands of a dtype, or None where there is no figure."""
        tera = self.tera_flops.get(dtype)
        return None if tera is None else tera * 1e12


def _half(tera: float, float32: float | None = None) -> dict[str, float]:
    """The peaks of a GPU since Ampere."""
    return {"bfloat16": tera, "float16": tera} | ({} if float32 is None else {"float32": float32})


_GIB = 2.0**30

CHIPS: tuple[Chip, ...] = (
    Chip(kinds=r"TPU v2", tera_flops={"bfloat16": 45 / 2}, source=GOOGLE),
    Chip(kinds=r"TPU v3", tera_flops={"bfloat16": 123 / 2}, source=GOOGLE),
    Chip(kinds=r"TPU v4", tera_flops={"bfloat16": 275}, source=GOOGLE),
    # Memory is what libtpu gives programs: 16, 95 and 32 GB without its own part. Links: the bidirectional bandwidth of
    # a chip (400, 1200, 800 and 1200 GB/s) over its ports (4, 6, 4, 6), halved. Network: adapters of a host over its
    # chips (2 x 100 Gb/s over 8, 200 Gb/s over 4, 4 x 200 Gb/s over 8; TPU7x 100 Gb/s per chip).
    Chip(
        kinds=r"TPU v5 lite|TPU v5e",
        tera_flops={"bfloat16": 197},
        hbm_bytes=15.75 * _GIB,
        hbm_bandwidth=819e9,
        link=50e9,
        across=3.125e9,
        source=GOOGLE,
    ),
    Chip(
        kinds=r"TPU v5p?",
        tera_flops={"bfloat16": 459},
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765e9,
        link=100e9,
        across=6.25e9,
        source=GOOGLE,
    ),
    Chip(
        kinds=r"TPU v6 lite|TPU v6e",
        tera_flops={"bfloat16": 918},
        hbm_bytes=31.25 * _GIB,
        hbm_bandwidth=1600e9,
        link=100e9,
        across=12.5e9,
        source=GOOGLE,
    ),
    Chip(  # a device is half a chip, and has half of everything
        kinds=r"TPU7x|TPU v7x?",
        tera_flops={"bfloat16": 2307 / 2},
        hbm_bytes=96 * _GIB,
        hbm_bandwidth=7380e9 / 2,
        link=100e9 / 2,
        across=12.5e9 / 2,
        source=GOOGLE,
    ),
    Chip(kinds=r"(NVIDIA |Tesla )*V100-PCIE-\d+GB", tera_flops={"float16": 112, "float32": 14}, source=V100),
    Chip(
        kinds=r"(NVIDIA |Tesla )*V100-(SXM[23]|DGXS)-\d+GB(-LS)?",
        tera_flops={"float16": 125, "float32": 15.7},
        source=V100,
    ),
    Chip(kinds=r"(NVIDIA )?A100[ -].*", tera_flops=_half(312, 19.5), source=A100),
    Chip(kinds=r"NVIDIA H100 PCIe", tera_flops=_half(756, 51), source=H100),
    Chip(kinds=r"NVIDIA H(100|200) NVL", tera_flops=_half(835, 60), source=H100),
    Chip(
        kinds=r"NVIDIA H100 80GB HBM3",
        tera_flops=_half(989, 67),
        hbm_bytes=79.2 * _GIB,
        hbm_bandwidth=3350e9,
        link=450e9,
        across=50e9,
        source=H100,
    ),
    Chip(
        kinds=r"NVIDIA H200",
        tera_flops=_half(989, 67),
        hbm_bytes=141e9,
        hbm_bandwidth=4800e9,
        link=450e9,
        across=50e9,
        source=H100,
    ),
    Chip(kinds=r"NVIDIA B200", tera_flops=_half(2250, 75), source=B200),
    Chip(kinds=r"NVIDIA L4", tera_flops=_half(121, 30.3), source=A100),
    Chip(kinds=r"NVIDIA A10", tera_flops=_half(125, 31.2), source=A100),
    Chip(kinds=r"NVIDIA GeForce RTX 4090", tera_flops=_half(165.2, 82.6), source=A100),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the row of a device, or None where there is none, as for every CPU.

    Args:
      device_kind: `jax.Device.device_kind`; a slice of a GPU (MIG) is unknown.
    """
    # A slice reports the name of the whole GPU, whose peak it does not have.
    if "MIG" in device_kind:
        return None
    return next((chip for chip in CHIPS if re.fullmatch(chip.kinds, device_kind)), None)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the dense FLOP/s of one jax device by its datasheet, or None where unknown.

    Args:
      device_kind: see `chip_of`.
      dtype: of the operands; unknown if the device has no units for it.

    >>> peak_flops("NVIDIA H200", "bfloat16"), peak_flops("TPU v5 lite", "float32"), peak_flops("cpu", "float32")
    (989000000000000.0, None, None)
    """
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak(dtype)
