"""Programs that are compiled ahead of the steps that run them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdpo.devices import target
from jdpo.processes import PROGRESS
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
            self._programs[shapes] = _finished(program)
        # Programs that a step had to wait for, as they were not prepared: planning should prepare all.
        self.num_late = 0

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Starts compiling for batches of these shapes in the background, in this order.

        The first one is awaited; on CPU, the others are compiled at the lowest priority, as steps need the same cores.
        """
        for number, batch in enumerate(batches):
            shapes = shapes_of(batch)
            if shapes not in self._programs:
                compiling = compile_for if number == 0 else compile_behind
                self._programs[shapes] = self._pool.submit(compiling, self._lower, shapes)

    def ready(self, batch: Batch) -> bool:
        """Returns True if `of` would not wait."""
        future = self._programs.get(shapes_of(batch))
        return future is not None and future.done()

    def of(self, batch: Batch) -> Any:
        """Returns the program for a batch, and waits until it is compiled.

        A program that was not prepared is counted in `num_late`.
        """
        shapes = shapes_of(batch)
        future = self._programs.get(shapes)
        if future is None:
            self.num_late += 1
            self.prepare([batch])
            future = self._programs[shapes]
        # One that waits behind others is compiled here and now, except where all processes must keep one order.
        if jax.process_count() == 1 and future.cancel():
            self._programs[shapes] = future = _compiled_here(self._lower, shapes)
        return future.result()

    def check(self) -> None:
        """Raises the error of a failed compilation now, and not at the step that needs its program."""
        for future in self._programs.values():
            if future.done():
                future.result()

    def wait(self) -> None:
        """Waits until everything that was prepared is compiled; what waits behind others is compiled here."""
        for shapes in list(self._programs):
            self.of(shapes)

    def __len__(self) -> int:
        return len(self._programs)


def _finished(program: Any) -> Future[Any]:
    """Returns a finished future, so that a program is found like those that the threads compile."""
    done: Future[Any] = Future()
    done.set_result(program)
    return done


def _compiled_here(lower: Callable[[Batch], Any], batch: Batch) -> Future[Any]:
    """Compiles in this thread; as in the others, an error is kept in the future, which raises it when it is read."""
    done: Future[Any] = Future()
    try:
        done.set_result(compile_for(lower, batch))
    except Exception as error:
        done.set_exception(error)
    return done


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


def compile_behind(lower: Callable[[Batch], Any], batch: Batch) -> Any:
    """Does the same; on CPU with the lowest priority from now on, so that steps on the same cores come first.

    Python's part and the loading of kept programs run in this thread. XLA generates code in threads of its own.
    """
    # On Linux a thread has a priority of its own, and only a privileged process could raise it again.
    if target().platform == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError):  # where a sandbox forbids it, programs compile as before
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    return compile_for(lower, batch)


def compile_lowered(lowered: Any) -> Any:
    """Compiles a lowered function."""
    program = lowered.compile()
    PROGRESS.made("compile")
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

    There is one thread where processes compile the same programs for GPUs: their compilations communicate, to choose
    kernels together, and must do so in the same order. Each host of a TPU slice compiles for itself. On CPU there is
    one thread because steps need the cores.
    """
    platform = target().platform
    alone = platform == "cpu" or (platform != "tpu" and jax.process_count() > 1)
    # More than four compilations at once need more memory than they save time.
    workers = 1 if alone else min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="jdpo-compile")
    try:
        yield pool
    finally:
        # A compilation cannot be interrupted; those that have not begun are dropped.
        pool.shutdown(wait=True, cancel_futures=True)
