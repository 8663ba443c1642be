"""Work spread over processes, with the results in the order of the tasks.

The processes are started anew and not forked, since a process that has run jax has threads which do not survive a
fork. They import nothing of the user's script, so that it needs no `if __name__ == "__main__"`.
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
"""Tasks for each process that are read ahead of the result that is waited for."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # one process a core is enough
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # the first process has said them
}


def available_cores() -> int:
    """Cores that this process may use, by affinity and by the limits of its container."""
    import loky

    return int(loky.cpu_count())


def map_in_order(work: Callable[[S, T], R], state: S, tasks: Iterable[T], *, num_proc: int) -> Iterator[R]:
    """Yields `work(state, task)` for every task, in their order.

    Args:
      work: a function of a module; it runs in the processes.
      state: what all calls share; it is sent to each process once.
      tasks: read as they are needed, a few ahead for each process.
      num_proc: processes; with 1 all runs in this one.

    Raises:
      Exception: what `work` raises, at its task, or what `tasks` raises.
      ValueError: a process ended before its work was done.
    """
    if num_proc == 1:
        for task in tasks:
            yield work(state, task)
        return
    from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

    executor = ProcessPoolExecutor(
        num_proc, initializer=_begin, initargs=(work, state, os.getpid()), env=ENVIRONMENT, timeout=None
    )
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            with _no_interrupt() if not pending else contextlib.nullcontext():
                pending.append(executor.submit(_run, task))
            if len(pending) > IN_FLIGHT * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenizes rows ended before its work was done: was it killed for want of memory? Set "
            "dataset_num_proc to fewer processes, or to 1"
        ) from error
    finally:
        executor.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that start meanwhile never see the Ctrl-C that a terminal sends to all: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the processes

_shared: tuple[Callable[[Any, Any], Any], Any] | None = None
"""What `_begin` was given; of the processes alone."""


def _begin(work: Callable[[S, T], R], state: S, parent: int) -> None:
    global _shared
    _shared = work, state
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, even where that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: Any) -> Any:
    assert _shared is not None
    work, state = _shared
    return work(state, task)
