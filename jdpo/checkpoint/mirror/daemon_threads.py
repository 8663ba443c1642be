"""Work on several files at a time, which a process that ends does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from jdpo.checkpoint.mirror.object_store import StoreError


def in_daemon_threads(
    work: Callable[[str], object], names: Iterable[str], at_once: int, ended: Callable[[], bool]
) -> list[Exception]:
    """Calls `work` with each name, in several threads.

    The threads of a ThreadPoolExecutor would keep the interpreter alive until all names are done, long after a run has
    given its uploads up.

    Args:
      at_once: number of threads.
      ended: returns True if no further name is to be begun.

    Returns:
      the errors that `work` raised, and a StoreError if there are names that were not begun.
    """
    waiting, errors, lock = iter(list(names)), list[Exception](), threading.Lock()

    def run() -> None:
        while not ended():
            with lock:
                name = next(waiting, None)
            if name is None:
                return
            try:
                work(name)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=run, name=f"mirror-{index}", daemon=True) for index in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if next(waiting, None) is not None:
        errors.append(StoreError("the uploads of this start were given up"))
    return errors
