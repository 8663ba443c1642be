"""Windows: blocks of a flat run of elements seen along other axes, for moving weights between layouts without copies.

A tensor of a file is a flat run of elements. Its part that is a block of one parameter, with the axes in the
decoder's order, is a window of that run: a start, and for every axis a size and a stride. Cutting a window to a shard,
and splitting it into chunks that fit a buffer, is arithmetic on these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_DIM = re.compile(r"(?:\([^)]*\)|\[[^\]]*\]|[^\s()\[\]]+)+")
_PART = re.compile(r"(?P<mine>\([^)]*\)|[^\s()\[\]]+)|(?P<other>\[[^\]]*\])")
_INDEX = re.compile(r"(\d+)/(\d+)")
_WORTH_A_SEEK = 64 * 1024  # elements: shorter gaps are read over rather than skipped


class Window(NamedTuple):
    """Element (i, j, ..) stands at start + i * strides[0] + j * strides[1] + .. of the run; all counted in elements."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the run from the first that belongs to the window to the last, both counted."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether every element between the first and the last belongs to the window."""
        return self.span == self.size

    def cut(self, bounds: Sequence[tuple[int, int]]) -> Window:
        """The part from one index to another (not counted) along every axis."""
        start = self.start + sum(low * stride for (low, _), stride in zip(bounds, self.strides, strict=True))
        return Window(start, tuple(high - low for low, high in bounds), self.strides)

    def view(self, run: np.ndarray, first: int = 0) -> np.ndarray:
        """The window as an array over the memory of `run`, [n], which holds the elements from number `first` on."""
        assert first <= self.start, (first, self)
        assert self.start - first + self.span <= run.size, (first, run.size, self)
        strides = tuple(stride * run.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(run[self.start - first :], self.shape, strides)

    def chunks(self, max_elements: int) -> Iterator[tuple[tuple[tuple[int, int], ...], Window]]:
        """Yields (bounds in this window, the part there), each spanning at most max_elements, or one element.

        Parts are cut along the axis with the largest stride first, so that a dense window falls into dense parts that
        follow each other. What lies between the elements of a part is read with it, but for long gaps.
        """
        yield from _chunks(self, tuple((0, size) for size in self.shape), max_elements)


def _chunks(
    window: Window, bounds: tuple[tuple[int, int], ...], max_elements: int
) -> Iterator[tuple[tuple[tuple[int, int], ...], Window]]:
    part = window.cut(bounds)
    divisible = [axis for axis, size in enumerate(part.shape) if size > 1]
    axis = max(divisible, key=part.strides.__getitem__, default=None)
    if axis is None:
        yield bounds, part
        return
    stride, size = part.strides[axis], part.shape[axis]
    inner = part.span - (size - 1) * stride  # what one step along the axis spans
    if part.span <= max_elements and stride - inner < _WORTH_A_SEEK:
        yield bounds, part
        return
    at_once = max(1, (max_elements - inner) // stride + 1) if stride - inner < _WORTH_A_SEEK else 1
    low, high = bounds[axis]
    for first in range(low, high, at_once):
        inside = (first, min(first + at_once, high))
        yield from _chunks(window, (*bounds[:axis], inside, *bounds[axis + 1 :]), max_elements)


def window_of(pattern: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], Window]:
    """The shape of a checkpoint's tensor, and the window in which a block of a parameter stands in it.

    Args:
      pattern: the tensor's dims on the left of "->", the block's axes on the right, each an axis letter. A dim may be
        axes in parentheses, outermost first, as einops writes them: "(h k) d -> d h k". Parts that lie one behind the
        other in a dim are written without a space, those of others in brackets: "[h k](g k)[g k] d -> d g k". Where
        an axis of the tensor has no letter in the block, "i/n" takes index i of its n: "(h 1/3 k) d -> d h k".
      sizes: of every axis letter.

    >>> window_of("(h k) d -> d h k", {"h": 2, "k": 4, "d": 16})
    ((8, 16), Window(start=0, shape=(16, 2, 4), strides=(1, 64, 16)))
    >>> window_of("[f]f d -> d f", {"f": 32, "d": 16})
    ((64, 16), Window(start=512, shape=(16, 32), strides=(1, 16)))
    >>> window_of("(h 1/3 k) -> h k", {"h": 2, "k": 4})
    ((24,), Window(start=4, shape=(2, 4), strides=(12, 1)))
    """
    theirs, ours = pattern.split("->")
    dims = [_parts(dim, sizes) for dim in _DIM.findall(theirs)]
    shape = tuple(sum(math.prod(size for _, size in axes) for _, axes in parts) for parts in dims)
    start, strides = 0, dict[str, int]()
    for number, parts in enumerate(dims):
        stride = math.prod(shape[number + 1 :])
        before = 0
        assert sum(is_mine for is_mine, _ in parts) == 1, pattern
        for is_mine, axes in parts:
            if is_mine:
                start += before * stride
                for axis, size in reversed(axes):
                    index = _INDEX.fullmatch(axis)
                    if index:
                        start += int(index[1]) * stride
                    else:
                        assert axis not in strides, pattern
                        strides[axis] = stride
                    stride *= size
                break
            before += math.prod(size for _, size in axes)
    own = ours.split()
    assert set(own) == set(strides), pattern
    return shape, Window(start, tuple(sizes[axis] for axis in own), tuple(strides[axis] for axis in own))


def _parts(dim: str, sizes: Mapping[str, int]) -> list[tuple[bool, list[tuple[str, int]]]]:
    """The parts of a dim as (whether it is the block's, its axes with their sizes)."""

    def size(axis: str) -> int:
        index = _INDEX.fullmatch(axis)
        return int(index[2]) if index else sizes[axis]

    return [
        (found["mine"] is not None, [(axis, size(axis)) for axis in found[0].strip("()[]").split()])
        for found in _PART.finditer(dim)
    ]
