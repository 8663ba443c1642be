"""Strided views of a flat run of elements, for moving weights between layouts without copies.

A tensor of a file is a flat run of elements. The part of it that belongs to one parameter, with the axes in the
decoder's order, is a strided view of that run: a start, and a size and a stride for every axis. Cutting a view to a
shard, and splitting it into chunks that fit a buffer, is arithmetic on these numbers.
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
_WORTH_A_SEEK = 64 * 1024  # elements; shorter gaps are read over rather than skipped


class StridedView(NamedTuple):
    """A part of a run whose element (i, j, ..) is number start + i * strides[0] + j * strides[1] + .. of the run."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Number of elements of the run from the view's first to its last, both counted."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_dense(self) -> bool:
        """True if every element of the run between the view's first and last belongs to the view."""
        return self.span == self.size

    def cut(self, bounds: Sequence[tuple[int, int]]) -> StridedView:
        """Returns the part between two indices, the second not counted, along every axis."""
        start = self.start + sum(low * stride for (low, _), stride in zip(bounds, self.strides, strict=True))
        return StridedView(start, tuple(high - low for low, high in bounds), self.strides)

    def array(self, run: np.ndarray, first: int = 0) -> np.ndarray:
        """Returns the view as an array over the memory of `run` [n], whose first element is number `first`."""
        assert first <= self.start, (first, self)
        assert self.start - first + self.span <= run.size, (first, run.size, self)
        strides = tuple(stride * run.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(run[self.start - first :], self.shape, strides)

    def chunks(self, max_elements: int) -> Iterator[tuple[tuple[tuple[int, int], ...], StridedView]]:
        """Yields (bounds in this view, the part there), each spanning at most max_elements, or one element.

        Parts are cut along the axis with the largest stride first, so that a dense view falls into dense parts that
        follow each other. A part may span elements that do not belong to the view, unless the gap is long.
        """
        yield from _chunks(self, tuple((0, size) for size in self.shape), max_elements)


def _chunks(
    view: StridedView, bounds: tuple[tuple[int, int], ...], max_elements: int
) -> Iterator[tuple[tuple[tuple[int, int], ...], StridedView]]:
    part = view.cut(bounds)
    # Cut along the axis that is outermost in the file, so that each part is as contiguous as possible.
    divisible = [axis for axis, size in enumerate(part.shape) if size > 1]
    axis = max(divisible, key=part.strides.__getitem__, default=None)
    if axis is None:
        yield bounds, part
        return
    stride, size = part.strides[axis], part.shape[axis]
    inner = part.span - (size - 1) * stride  # elements spanned at one index of the axis
    if part.span <= max_elements and stride - inner < _WORTH_A_SEEK:
        yield bounds, part
        return
    # As many indices of the axis as fit, or a single one if there are long gaps between them.
    at_once = max(1, (max_elements - inner) // stride + 1) if stride - inner < _WORTH_A_SEEK else 1
    low, high = bounds[axis]
    for first in range(low, high, at_once):
        inside = (first, min(first + at_once, high))
        yield from _chunks(view, (*bounds[:axis], inside, *bounds[axis + 1 :]), max_elements)


def view_of(pattern: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], StridedView]:
    """Returns the shape of a checkpoint's tensor, and the view of it that is one parameter, or one layer of it.

    Args:
      pattern: the tensor's dims on the left of "->", the parameter's axes on the right, each an axis letter. A dim may
        be axes in parentheses, outermost first, as einops writes them: "(h k) d -> d h k". Parts that follow each other
        in a dim are written without a space, those of other parameters in brackets: "[h k](g k)[g k] d -> d g k". Where
        an axis of the tensor has no letter in the parameter, "i/n" takes index i of n: "(h 1/3 k) d -> d h k".
      sizes: the size of every axis letter.

    >>> view_of("(h k) d -> d h k", {"h": 2, "k": 4, "d": 16})
    ((8, 16), StridedView(start=0, shape=(16, 2, 4), strides=(1, 64, 16)))
    >>> view_of("[f]f d -> d f", {"f": 32, "d": 16})
    ((64, 16), StridedView(start=512, shape=(16, 32), strides=(1, 16)))
    >>> view_of("(h 1/3 k) -> h k", {"h": 2, "k": 4})
    ((24,), StridedView(start=4, shape=(2, 4), strides=(12, 1)))
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
                # The innermost axis of a dim has the dim's own stride.
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
    return shape, StridedView(start, tuple(sizes[axis] for axis in own), tuple(strides[axis] for axis in own))


def _parts(dim: str, sizes: Mapping[str, int]) -> list[tuple[bool, list[tuple[str, int]]]]:
    """Returns the parts of a dim as (True if it is the parameter's own, its axes with their sizes)."""

    def size(axis: str) -> int:
        index = _INDEX.fullmatch(axis)
        return int(index[2]) if index else sizes[axis]

    return [
        (found["mine"] is not None, [(axis, size(axis)) for axis in found[0].strip("()[]").split()])
        for found in _PART.finditer(dim)
    ]
