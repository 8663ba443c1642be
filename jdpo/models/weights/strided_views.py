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

# Axes in parentheses, which may have others within, axes in brackets, or one axis.
_PART = re.compile(r"\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\]|[^\s()\[\]]+")
_DIM = re.compile(rf"(?:{_PART.pattern})+")
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


class Range(NamedTuple):
    """A range of a run, and the part of each of several views in it, as (bounds in the view, the part there)."""

    start: int
    size: int
    parts: list[tuple[tuple[tuple[int, int], ...], StridedView]]


def common_ranges(views: Sequence[StridedView], size: int, max_elements: int) -> Iterator[Range]:
    """Yields ranges that together are a run of `size` elements, for views that interleave and fill all of it.

    A range has at most max_elements where the views have axes in common to cut along, such as that of experts, and
    contains whatever the views have between its ends.
    """
    whole = [(tuple((0, length) for length in view.shape), view) for view in views]
    yield from _common_ranges(Range(0, size, whole), max_elements)


def _common_ranges(found: Range, max_elements: int) -> Iterator[Range]:
    start, size, parts = found
    stride = _common_stride(found)
    if size <= max_elements or stride is None:
        yield found
        return
    at_once = max(1, max_elements // stride)
    for first in range(0, size // stride, at_once):
        last, cut = min(first + at_once, size // stride), []
        for bounds, view in parts:
            axis = next(i for i, n in enumerate(view.shape) if n > 1 and view.strides[i] == stride)
            low = bounds[axis][0]
            inside = (*bounds[:axis], (low + first, low + last), *bounds[axis + 1 :])
            own = tuple((first, last) if i == axis else (0, n) for i, n in enumerate(view.shape))
            cut.append((inside, view.cut(own)))
        yield from _common_ranges(Range(start + first * stride, (last - first) * stride, cut), max_elements)


def _common_stride(found: Range) -> int | None:
    """Returns the largest stride at which the range can be cut: an axis of every view, from end to end of the range."""
    start, size, parts = found
    axes = [{stride: n for stride, n in zip(view.strides, view.shape, strict=True) if n > 1} for _, view in parts]
    for stride in sorted(set.intersection(*map(set, axes)), reverse=True):
        if all(own[stride] * stride == size for own in axes) and all(
            # No part reaches beyond its own step.
            view.start - start + view.span - (own[stride] - 1) * stride <= stride
            for own, (_, view) in zip(axes, parts, strict=True)
        ):
            return stride
    return None


def view_of(pattern: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], StridedView]:
    """Returns the shape of a checkpoint's tensor, and the view of it that is one parameter, or one layer of it.

    Args:
      pattern: the tensor's dims on the left of "->", the parameter's axes on the right, each an axis letter. A dim may
        be axes in parentheses, outermost first, as einops writes them: "(h k) d -> d h k". Parts that follow each other
        in a dim are written without a space, those of other parameters in brackets: "[h k](g k)[g k] d -> d g k". Where
        an axis of the tensor has no letter in the parameter, "i/n" takes index i of n: "(h 1/3 k) d -> d h k". Parts
        may follow each other within an axis, too: "(h (k)[f]) d -> d h k" has k rows and then f others for each h.
      sizes: the size of every axis letter.

    >>> view_of("(h k) d -> d h k", {"h": 2, "k": 4, "d": 16})
    ((8, 16), StridedView(start=0, shape=(16, 2, 4), strides=(1, 64, 16)))
    >>> view_of("[f]f d -> d f", {"f": 32, "d": 16})
    ((64, 16), StridedView(start=512, shape=(16, 32), strides=(1, 16)))
    >>> view_of("(h 1/3 k) -> h k", {"h": 2, "k": 4})
    ((24,), StridedView(start=4, shape=(2, 4), strides=(12, 1)))
    >>> view_of("(h [f](k)) -> h k", {"h": 2, "k": 4, "f": 3})
    ((14,), StridedView(start=3, shape=(2, 4), strides=(7, 1)))
    """
    theirs, ours = pattern.split("->")
    dims = [_concatenation(dim, sizes) for dim in _DIM.findall(theirs)]
    shape = tuple(dim.size for dim in dims)
    start, strides = 0, dict[str, int]()
    for number, dim in enumerate(dims):
        stride = math.prod(shape[number + 1 :])
        start += dim.start * stride
        assert not strides.keys() & dim.strides.keys(), pattern
        strides |= {axis: inner * stride for axis, inner in dim.strides.items()}
    own = ours.split()
    assert set(own) == set(strides), pattern
    return shape, StridedView(start, tuple(sizes[axis] for axis in own), tuple(strides[axis] for axis in own))


class _Run(NamedTuple):
    """Consecutive elements, and where the parameter's own are among them: its first, and the stride of each axis."""

    size: int
    start: int
    strides: dict[str, int]


def _concatenation(text: str, sizes: Mapping[str, int]) -> _Run:
    """Reads parts that follow each other, such as "[h k](g k)[g k]"; one of them is the parameter's own."""
    own: _Run | None = None
    size = 0
    for part in _PART.findall(text):
        of_part = _product(part[1:-1] if part[0] in "([" else part, sizes)
        if part[0] != "[":
            assert own is None, text
            own = of_part._replace(start=size + of_part.start)
        size += of_part.size
    assert own is not None, text
    return own._replace(size=size)


def _product(text: str, sizes: Mapping[str, int]) -> _Run:
    """Reads axes, outermost first, such as "h 1/3 k"; an axis may be a concatenation itself."""
    size, start, strides = 1, 0, dict[str, int]()
    # The innermost axis has stride 1.
    for axis in reversed(_DIM.findall(text)):
        index = _INDEX.fullmatch(axis)
        if index:
            of_axis = _Run(int(index[2]), int(index[1]), {})
        elif "(" in axis or "[" in axis:
            of_axis = _concatenation(axis, sizes)
        else:
            of_axis = _Run(sizes[axis], 0, {axis: 1})
        start += of_axis.start * size
        assert not strides.keys() & of_axis.strides.keys(), text
        strides |= {name: stride * size for name, stride in of_axis.strides.items()}
        size *= of_axis.size
    return _Run(size, start, strides)
