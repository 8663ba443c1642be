"""Time limits for work that may never return, such as reading a disk that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TimeLimits:
    """Runs work on threads, each with a time limit.

    Attributes:
      stuck: names of the work that has not returned in time. A process with any of it cannot end in order: its thread
        may be inside a call of the system or of a driver that never returns.
    """

    def __init__(self) -> None:
        self.stuck: list[str] = []

    def run(self, name: str, seconds: float, work: Callable[[], T]) -> T:
        """Calls `work` and returns its result.

        Raises:
          TimeoutError: it has not returned within `seconds`; it goes on, and nobody waits for it.
          Exception: the error of `work`.
        """
        call = _Call(work)
        # A daemon, so that Python does not wait for it at the end either.
        thread = threading.Thread(target=call.make, name=name, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.stuck.append(name)
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        if call.error is not None:
            raise call.error
        return call.results[0]


class _Call(Generic[T]):
    """A call with its result or its error."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.results: list[T] = []
        self.error: Exception | None = None

    def make(self) -> None:
        try:
            self.results.append(self._work())
        except Exception as error:
            self.error = error
