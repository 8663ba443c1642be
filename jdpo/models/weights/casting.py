"""Copies of weights from one dtype and layout to another on the host, chunk by chunk, without the interpreter's lock.

numpy casts to and from bfloat16 element by element while it holds the lock, so that threads would wait for each other;
here a bfloat16 is what it is, the upper half of a float32, and integer operations do the work.
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
"""The bits of the exponent: all of them are set in NaN and in infinity, and in nothing else."""


PADDING_BYTES = 64
"""Between the rows of a matrix that is read along its columns.

Rows of weights are whole kilobytes long: elements below each other fall on the same few lines of the cache and drive
each other out, which makes reading along a column four times slower.
"""


class Scratch:
    """Memory that each thread uses again and again, since fresh memory costs as much as filling it."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def array(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        """[size] of a dtype; its content lasts until this thread asks for that name again."""
        num_bytes = size * dtype.itemsize
        memory: np.ndarray | None = getattr(self._of_thread, name, None)
        if memory is None or memory.size < num_bytes:
            memory = np.empty(num_bytes, np.uint8)
            setattr(self._of_thread, name, memory)
        return memory[:num_bytes].view(dtype)


def bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers of the same width."""
    return values.view(np.dtype(f"u{values.itemsize}"))


def all_finite(values: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    if not values.size:
        return True
    integers, mask = bits(values), _EXPONENTS[values.dtype]
    return int((integers & integers.dtype.type(mask)).max()) != mask


def is_narrower(target: np.dtype, source: np.dtype) -> bool:
    """Whether a dtype has numbers that overflow in another."""
    return float(ml_dtypes.finfo(target).max) < float(ml_dtypes.finfo(source).max)


def copy_cast(source: np.ndarray, target: np.ndarray, *, target_is_zero: bool = False) -> None:
    """target[...] = source, rounded to nearest even where the target's dtype is narrower.

    Args:
      source: finite, in any layout; fastest where neighbours in `target` are not whole kilobytes apart.
      target: its last axis contiguous.
      target_is_zero: its memory holds zeros, which then need not be written.
    """
    if source.dtype == target.dtype:
        bits(target)[...] = bits(source)
    elif source.dtype == BFLOAT16 and target.dtype == np.float32 and target.ndim:
        halves = target.view(np.uint16)
        halves[..., 1::2] = bits(source)  # little-endian
        if not target_is_zero:
            halves[..., 0::2] = 0
    elif source.dtype == BFLOAT16:
        wide = np.zeros(source.shape, np.float32)
        copy_cast(source.reshape(source.shape or (1,)), wide.reshape(source.shape or (1,)), target_is_zero=True)
        copy_cast(wide, target)
    elif target.dtype == BFLOAT16:
        bits(target)[...] = _to_bfloat16(np.ascontiguousarray(source, np.float32))
    else:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which callers look for
            target[...] = source


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; for finite values: the sum would carry some NaNs over to zero."""
    integers = bits(values)
    rounded = integers >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += integers
    rounded >>= 16
    return rounded.astype(np.uint16)
