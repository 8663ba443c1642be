"""Copies weights between dtypes and layouts on the host, chunk by chunk, without holding the interpreter's lock.

numpy casts to and from bfloat16 element by element and holds the lock meanwhile, so that threads would wait for each
other. A bfloat16 is the upper half of a float32, so integer operations can do the same.
"""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXPONENTS = {
    np.dtype(np.float64): 0x7FF0000000000000,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    BFLOAT16: 0x7F80,
}
"""The bits of the exponent. All of them are set in NaN and in infinity, and in nothing else."""

PADDING_BYTES = 64
"""Bytes between the rows of a matrix that is read along its columns.

Rows of weights are whole kilobytes long. Without padding, elements below each other share a few cache lines and evict
each other, which makes reading along a column four times slower.
"""

_ALIGNMENT = 64
"""Arrays of jax on a CPU can use host memory directly where it is aligned to this many bytes."""


class Scratch:
    """Memory that each thread uses again and again, since fresh memory costs as much as filling it."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def array(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        """Returns an aligned array [size], whose content lasts until this thread asks for that name again."""
        num_bytes = size * dtype.itemsize
        memory: np.ndarray | None = getattr(self._of_thread, name, None)
        if memory is None or memory.size < num_bytes:
            memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
            # Starts at the first aligned address; the bytes before it are not used.
            memory = memory[-memory.__array_interface__["data"][0] % _ALIGNMENT :]
            setattr(self._of_thread, name, memory)
        return memory[:num_bytes].view(dtype)


def bits(values: np.ndarray) -> np.ndarray:
    """Returns the same memory as unsigned integers of the same width."""
    return values.view(np.dtype(f"u{values.itemsize}"))


def all_finite(values: np.ndarray) -> bool:
    """Returns True if no element is NaN or infinite."""
    if not values.size:
        return True
    integers, mask = bits(values), _EXPONENTS[values.dtype]
    # As integers, because numpy's own check of bfloat16 holds the interpreter's lock.
    return int((integers & integers.dtype.type(mask)).max()) != mask


def is_narrower(target: np.dtype, source: np.dtype) -> bool:
    """Returns True if finite numbers of `source` can overflow in `target`."""
    return float(ml_dtypes.finfo(target).max) < float(ml_dtypes.finfo(source).max)


def copy_cast(source: np.ndarray, target: np.ndarray) -> None:
    """Sets target[...] = source, rounding to nearest even where the target's dtype is narrower.

    Args:
      source: finite numbers in any layout; fastest where neighbours in `target` are not whole kilobytes apart.
      target: an array of the same shape.
    """
    if source.dtype == target.dtype:
        bits(target)[...] = bits(source)
    elif source.dtype == BFLOAT16 and target.dtype == np.float32:
        np.left_shift(bits(source), 16, out=bits(target), dtype=np.uint32)
    elif source.dtype == BFLOAT16:
        # To float16 or float64 by way of float32, which holds every bfloat16 exactly.
        wide = np.empty(source.shape, np.float32)
        copy_cast(source, wide)
        copy_cast(wide, target)
    elif target.dtype == BFLOAT16:
        bits(target)[...] = _to_bfloat16(np.asarray(source, np.float32))
    else:
        with np.errstate(over="ignore"):  # numbers that do not fit become infinite, which callers look for
            target[...] = source


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns the bits of the nearest bfloat16, ties to even, of finite values: the sum would turn some NaNs into 0."""
    integers = bits(values)
    rounded = integers >> 16
    # Adds 0x7FFF and the last bit that is kept: more than half rounds up, and a tie rounds to the even neighbour.
    rounded &= 1
    rounded += 0x7FFF
    rounded += integers
    rounded >>= 16
    return rounded.astype(np.uint16)
