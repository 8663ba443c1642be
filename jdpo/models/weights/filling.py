"""Threads that fill the memory of leaves from the tensors of a folder, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jdpo.models.weights.casting import PADDING_BYTES, Scratch, all_finite, copy_cast, is_narrower
from jdpo.models.weights.hf_names import Piece
from jdpo.models.weights.leaf_buffers import Bounds
from jdpo.models.weights.safetensors_folder import TensorFiles
from jdpo.models.weights.strided_views import Window

CHUNK_BYTES = 2**21
"""Read at once by a thread: enough for a disk, little enough to stay in a core's cache."""


class Target(NamedTuple):
    """Where a shard's part of a piece goes.

    Attributes:
      bounds: the part, in the piece's window.
      arrays: of its shape, filled alike.
    """

    bounds: Bounds
    arrays: list[np.ndarray]


class Filler:
    """Fills leaves from files with a pool of threads.

    Attributes:
      faults: tensor name -> what is wrong with it, as found so far.
    """

    def __init__(self, files: TensorFiles, pool: ThreadPoolExecutor) -> None:
        self.faults: dict[str, str] = {}
        self._files, self._pool = files, pool
        self._scratch = Scratch()

    def fill(
        self, pieces: Iterable[Piece], first_row: int, parts: Mapping[Bounds, list[np.ndarray]]
    ) -> list[Future[None]]:
        """Starts to fill a block of a leaf.

        Args:
          pieces: that the block is made of.
          first_row: the block's first index along the leaf's first axis.
          parts: as `LeafBuffers` has them.

        Returns:
          what is to be waited for.
        """
        futures: list[Future[None]] = []
        for piece in pieces:
            at = (piece.at[0] - first_row, *piece.at[1:]) if piece.at else ()
            targets = [target for bounds, arrays in parts.items() if (target := _target(at, bounds, arrays))]
            for group in _read_together(targets):
                box = _box([target.bounds for target in group])
                max_elements = CHUNK_BYTES // self._files.dtype(piece.hf_name).itemsize
                for inside, window in piece.window.cut(box).chunks(max_elements):
                    bounds = tuple((a + low, b + low) for (a, b), (low, _) in zip(inside, box, strict=True))
                    futures.append(self._pool.submit(self._move, piece.hf_name, window, bounds, group))
        return futures

    def end(self) -> None:
        """Cancels what has not begun and waits for the rest: nothing is written after it."""
        self._pool.shutdown(cancel_futures=True)

    def _move(self, name: str, window: Window, bounds: Bounds, targets: Sequence[Target]) -> None:
        """Reads one chunk and brings it to all shards that share it."""
        run = self._scratch.array("run", window.span, self._files.dtype(name))
        try:
            self._files.read_into(name, window.start, run)
        except ValueError as error:
            self.faults[name] = str(error)
            return
        if not all_finite(run):
            self.faults[name] = f"{self._files.place(name)} holds NaN or Inf: the model is damaged, take another copy"
            return
        source = self._laid_out(run, window)
        for target in targets:
            shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, target.bounds, strict=True))
            if any(low >= high for low, high in shared):
                continue
            part = source[_index(shared, bounds)]
            for array in target.arrays:
                index = _index(shared, target.bounds)
                copy_cast(part, array[index], target_is_zero=True)
                if is_narrower(array.dtype, part.dtype) and not all_finite(array[index]):
                    self.faults[name] = f"{self._files.place(name)} holds values that {array.dtype.name} cannot"

    def _laid_out(self, run: np.ndarray, window: Window) -> np.ndarray:
        """The window over its run; a transposed one over a copy with padded rows."""
        pitch = max(window.strides[-1], 1) if window.strides else 1
        if pitch == 1 or any(stride > pitch and stride % pitch for stride in window.strides):
            return window.view(run, window.start)
        wide = pitch + PADDING_BYTES // run.itemsize
        whole, rest = divmod(run.size, pitch)
        padded = self._scratch.array("padded", (whole + 1) * wide, run.dtype).reshape(-1, wide)
        padded[:whole, :pitch] = run[: whole * pitch].reshape(whole, pitch)
        padded[whole, :rest] = run[whole * pitch :]
        strides = tuple(stride if stride < pitch else stride // pitch * wide for stride in window.strides)
        return Window(0, window.shape, strides).view(padded.reshape(-1))


def _target(at: Sequence[int], bounds: Bounds, arrays: list[np.ndarray]) -> Target | None:
    """The part of a piece at some leading indices of a block that a shard holds; None: it holds nothing of it."""
    leading, inner = bounds[: len(at)], bounds[len(at) :]
    if any(not low <= i < high for i, (low, high) in zip(at, leading, strict=True)) or any(a >= b for a, b in inner):
        return None
    index = tuple(i - low for i, (low, _) in zip(at, leading, strict=True))
    return Target(inner, [array[index] if index else array for array in arrays])


def _read_together(targets: list[Target]) -> list[list[Target]]:
    """All targets in one group if their box is not much more than they are, else one by one."""
    if not targets:
        return []
    sizes = [_size(target.bounds) for target in targets]
    if _size(_box([target.bounds for target in targets])) <= 2 * sum(sizes):
        return [targets]
    return [[target] for target in targets]


def _index(part: Bounds, whole: Bounds) -> tuple[slice, ...]:
    """Where a part stands in an array of the whole."""
    return tuple(slice(low - first, high - first) for (low, high), (first, _) in zip(part, whole, strict=True))


def _box(all_bounds: Sequence[Bounds]) -> Bounds:
    return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*all_bounds, strict=True))


def _size(bounds: Bounds) -> int:
    size = 1
    for low, high in bounds:
        size *= high - low
    return size
