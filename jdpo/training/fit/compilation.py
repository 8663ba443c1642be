"""Programs that are compiled ahead of the steps that run them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdpo.training.step.objectives import Batch


class Programs:
    """The compiled forms of one function, one for each shape of its batches."""

    def __init__(
        self, lower: Callable[[Batch], Any], pool: ThreadPoolExecutor, compiled: Mapping[Batch, Any] | None = None
    ) -> None:
        """
        Args:
          lower: takes a batch of shapes, returns the lowered function (`jax.stages.Lowered`).
          pool: threads that compile; see `compiler_threads`.
          compiled: programs that there are already, by `shapes_of` their batches.
        """
        self._lower, self._pool = lower, pool
        self._programs: dict[Batch, Future[Any]] = {}
        for shapes, program in (compiled or {}).items():
            # Finished futures, so that these programs are found like those that the threads compile.
            done: Future[Any] = Future()
            done.set_result(program)
            self._programs[shapes] = done
        # Programs that a step had to wait for, as they were not prepared: planning should prepare all.
        self.num_late = 0

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Starts compiling for batches of these shapes in the background, in this order."""
        for batch in batches:
            shapes = shapes_of(batch)
            if shapes not in self._programs:
                self._programs[shapes] = self._pool.submit(compile_for, self._lower, shapes)

    def ready(self, batch: Batch) -> bool:
        """Returns True if `of` would not wait."""
        future = self._programs.get(shapes_of(batch))
        return future is not None and future.done()

    def of(self, batch: Batch) -> Any:
        """Returns the program for a batch, and waits until it is compiled.

        A program that was not prepared is counted in `num_late`.
        """
        future = self._programs.get(shapes_of(batch))
        if future is None:
            self.num_late += 1
            self.prepare([batch])
            future = self._programs[shapes_of(batch)]
        return future.result()

    def check(self) -> None:
        """Raises the error of a failed compilation now, and not at the step that needs its program."""
        for future in self._programs.values():
            if future.done():
                future.result()

    def wait(self) -> None:
        """Waits until everything that was prepared is compiled."""
        for future in self._programs.values():
            future.result()

    def __len__(self) -> int:
        return len(self._programs)


def shapes_of(batch: Batch) -> Batch:
    """Returns the batch with jax.ShapeDtypeStructs for arrays; hashable, so that programs are found by it."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(np.shape(array), array.dtype), batch)


_TRACING = threading.Lock()
"""Programs are traced one after the other and compiled at the same time: flax changes classes while it traces, which
another thread may be reading."""


def compile_for(lower: Callable[[Batch], Any], batch: Batch) -> Any:
    """Traces and compiles a function for batches of these shapes, in this thread."""
    # Only tracing is serialized: XLA's compilations release the GIL and run in parallel.
    with _TRACING:
        lowered = lower(shapes_of(batch))
    return compile_lowered(lowered)


def compile_lowered(lowered: Any) -> Any:
    """Compiles a lowered function."""
    program = lowered.compile()
    _give_back_memory()
    return program


def _give_back_memory() -> None:
    """Returns the heap that a compilation leaves, hundreds of MiB, to the system, where the C library is glibc."""
    # musl and macOS have no malloc_trim.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def compiler_threads() -> Iterator[ThreadPoolExecutor]:
    """Yields threads for `Programs`; compilations that have not begun when the block ends are dropped.

    There is one thread where several processes compile the same programs: on GPUs the compilations of the processes
    communicate, and must do so in the same order.
    """
    # More than four compilations at once need more memory than they save time.
    workers = 1 if jax.process_count() > 1 else min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="jdpo-compile")
    try:
        yield pool
    finally:
        # A compilation cannot be interrupted; those that have not begun are dropped.
        pool.shutdown(wait=True, cancel_futures=True)
