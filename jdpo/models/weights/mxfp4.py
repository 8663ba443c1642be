"""MXFP4, the format of gpt-oss' experts: 4-bit floats in groups of 32, with a power of two for each group.

From the OCP Microscaling Formats specification. A byte has two numbers, the first in its lower half; each is a sign,
two bits of exponent and one of mantissa. The scale of a group is a byte s that means 2^(s - 127). Products are exact in
bfloat16, except that 2^127 times more than 1.5 is infinite there, as it is in float32.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from jdpo.models.weights.casting import BFLOAT16, bits

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of the two tensors that hold one in MXFP4."""

GROUP = 32
"""Numbers that share a scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the bits of the numbers as bfloat16, uint16 [32 n].

    Args:
      blocks: uint8 [n, 16].
      scales: uint8 [n]. 255 means that the group is not a number.
    """
    # One look-up per byte, by its scale and itself, gives two numbers.
    index = scales[:, None].astype(np.uint16) << 8 | blocks
    return _pairs().take(index).view(np.uint16).reshape(-1)


def note(folder: Path) -> str:
    """Returns a line for the log about a folder with weights in MXFP4."""
    return (
        f"note: {folder} has its experts in MXFP4: they are dequantized to bfloat16, which holds them exactly, and an "
        "export has no quantization_config"
    )


@functools.cache
def _pairs() -> np.ndarray:
    """Returns the two numbers of every byte under every scale, uint32 [65536], the first one in the lower half."""
    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
    exponents = np.arange(256, dtype=np.int32) - 127
    with np.errstate(over="ignore"):
        numbers = bits(np.ldexp(values, exponents[:, None]).astype(BFLOAT16))
    numbers[255] = bits(np.array(np.nan, BFLOAT16))
    byte = np.arange(256)
    pairs = np.stack([numbers[:, byte & 0xF], numbers[:, byte >> 4]], axis=-1)
    return np.ascontiguousarray(pairs, dtype="<u2").view("<u4").reshape(-1)
