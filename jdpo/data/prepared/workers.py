"""A map over several processes, with results in the order of the tasks.

The processes are spawned by loky, not forked: a process that has run jax has threads, which do not survive a fork. They
do not import the user's script, so it needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 2
"""Tasks per process that are read ahead of the result that is waited for."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # one process per core is enough
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # the first process has shown them
}


def available_cores() -> int:
    """Returns the number of cores that this process may use by its affinity and its container's limits."""
    import loky

    return int(loky.cpu_count())


def map_in_order(work: Callable[[S, T], R], state: S, tasks: Iterable[T], *, num_proc: int) -> Iterator[R]:
    """Yields `work(state, task)` for every task, in their order.

    Args:
      work: a function of a module, which runs in the processes.
      state: the first argument of all calls; it is sent to each process once.
      tasks: read as needed, a few ahead per process.
      num_proc: number of processes; 1 runs everything in this one.

    Raises:
      Exception: any exception of `work`, at its task, or of `tasks`.
      ValueError: a process ended before it finished.
    """
    if num_proc == 1:
        for task in tasks:
            yield work(state, task)
        return
    from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

    # timeout=None: a process must not end while it waits for its next task, since it would have to start again.
    executor = ProcessPoolExecutor(
        num_proc, initializer=_start, initargs=(work, state, os.getpid()), env=ENVIRONMENT, timeout=None
    )
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            with no_interrupt() if not pending else contextlib.nullcontext():
                pending.append(executor.submit(_run, task))
            # Bounds the number of chunks in memory: reading is faster than tokenizing.
            if len(pending) > IN_FLIGHT * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenizes rows ended before it finished, perhaps killed for lack of memory; set "
            "dataset_num_proc to a smaller number"
        ) from error
    finally:
        # Also if the consumer stops early: tasks that were read ahead would otherwise run to their end.
        executor.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def no_interrupt() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM while processes are started, which inherit this.

    A terminal sends Ctrl-C to all processes, and Slurm SIGTERM to all processes of a task; only the main one should act
    on it, and end the others.
    """
    from multiprocessing import resource_tracker

    # It starts with the first process, which before Python 3.14 unblocks both signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the processes

_shared: tuple[Callable[[Any, Any], Any], Any] | None = None
"""The work and its state, set by `_start` in each process."""


def _start(work: Callable[[S, T], R], state: S, parent: int) -> None:
    global _shared
    _shared = work, state
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Makes this process end once its parent has ended, even if the parent was killed.

    Args:
      parent: its process id.
    """
    # A killed parent cannot end its processes; without this thread they would stay and hold memory.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended, even if the parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    # sys.exit would end this thread alone, while the main thread waits for a task that never comes.
    os._exit(1)


def _run(task: Any) -> Any:
    assert _shared is not None
    work, state = _shared
    return work(state, task)
