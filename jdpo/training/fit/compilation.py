"""Programs compiled ahead of the steps that run them, and kept on disk for the next start."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdpo.training.step.objectives import Batch

MOST_BYTES = 10 * 2**30
"""Compiled programs kept for a kind of machine."""

Shapes = tuple[tuple[tuple[int, ...], str], ...]


class Programs:
    """The compiled forms of one function, one for each shape that its batches come in."""

    def __init__(self, lower: Callable[[Batch], Any], pool: ThreadPoolExecutor) -> None:
        """
        Args:
          lower: an abstract batch -> the lowered function (`jax.stages.Lowered`).
          pool: threads that compile; see `compiler_threads`.
        """
        self._lower, self._pool = lower, pool
        self._programs: dict[Shapes, Future[Any]] = {}
        self.num_late = 0

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Starts compiling for batches like these in the background, in this order."""
        for batch in batches:
            shapes = shapes_of(batch)
            if shapes not in self._programs:
                self._programs[shapes] = self._pool.submit(compile_for, self._lower, batch)

    def keep(self, batch: Batch, program: Any) -> None:
        """Takes a program that was compiled elsewhere."""
        made: Future[Any] = Future()
        made.set_result(program)
        self._programs.setdefault(shapes_of(batch), made)

    def ready(self, batch: Batch) -> bool:
        """Whether `of` would not wait."""
        future = self._programs.get(shapes_of(batch))
        return future is not None and future.done()

    def of(self, batch: Batch) -> Any:
        """The program for a batch; waits while it is being compiled. One that nobody prepared counts in `num_late`."""
        future = self._programs.get(shapes_of(batch))
        if future is None:
            self.num_late += 1
            self.prepare([batch])
            future = self._programs[shapes_of(batch)]
        return future.result()

    def check(self) -> None:
        """Raises what a compilation in the background failed with: now, not at the step that needs its program."""
        for future in self._programs.values():
            if future.done():
                future.result()

    def wait(self) -> None:
        """Until all that was prepared is compiled."""
        for future in self._programs.values():
            future.result()

    def __len__(self) -> int:
        return len(self._programs)


_TRACING = threading.Lock()
"""Programs are traced one after the other, and compiled side by side: flax changes classes while it traces, which
another thread may be reading."""


def compile_for(lower: Callable[[Batch], Any], batch: Batch) -> Any:
    """The program for batches like this one, compiled here and now."""
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(np.shape(array), array.dtype), batch)
    with _TRACING:
        lowered = lower(abstract)
    program = lowered.compile()
    _give_back_memory()
    return program


def _give_back_memory() -> None:
    """Hands the heap that a compilation leaves behind, hundreds of MiB, back to the system, where glibc is at hand."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def shapes_of(batch: Batch) -> Shapes:
    """Shapes and dtypes of a batch, by which its program is found."""
    return tuple((np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(batch))


@contextlib.contextmanager
def compiler_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for `Programs`; what they have not begun when the block ends is dropped.

    One where several processes compile the same programs: those of a GPU then talk to each other, and must do so in
    the same order.
    """
    workers = 1 if jax.process_count() > 1 else min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="jdpo-compile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def persistent_cache(folder: Path | None) -> Iterator[None]:
    """Compiled programs are kept in `folder` while the block runs, and found there by later starts.

    Where the user has set jax's own jax_compilation_cache_dir, that is used.

    Args:
      folder: None keeps nothing.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    folder = folder / _machine()
    _drop_oldest(folder, MOST_BYTES)
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()  # jax settles on a folder at its first compilation
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _drop_oldest(folder: Path, most_bytes: int) -> None:
    """Deletes what was written first, as far as files take more than so many bytes together."""
    files = []
    with contextlib.suppress(OSError):  # another run may drop files, too
        files = sorted(((path.stat(), path) for path in folder.glob("*")), key=lambda file: -file[0].st_mtime_ns)
    total = 0
    for stat, path in files:
        total += stat.st_size
        if total > most_bytes:
            with contextlib.suppress(OSError):
                path.unlink()


def _machine() -> str:
    """A folder name for machines that can run each other's programs: those of a CPU use all that it has."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"{platform.machine()}-{_cpu_features()}"
    return f"{jax.default_backend()}-{kind}".replace(" ", "-").replace("/", "-")


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "any"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


class Stopwatch:
    """Seconds between marks, but for those spent in `paused` blocks."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since this object was made."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began
