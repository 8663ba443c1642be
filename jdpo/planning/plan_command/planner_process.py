"""Runs functions in a process of their own: a compiler that crashes, or runs out of memory, ends only that."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

from jdpo.data.prepared.workers import end_with_parent, no_interrupt


class PlannerCrashed(Exception):
    """The process that planned a target has ended before it had a result."""


class PlannerProcess:
    """Calls functions in one process, which is started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self._executor: Any = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns what a function of a module returns.

        Raises:
          PlannerCrashed: the process has ended.
          Exception: what the function raises.
        """
        from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        if self._executor is None:
            # timeout=None: jax is imported once, for all targets.
            self._executor = ProcessPoolExecutor(1, timeout=None, initializer=end_with_parent, initargs=(os.getpid(),))
        try:
            with warnings.catch_warnings():
                # A compiler needs hundreds of MB; loky replaces a process that has grown by so much after its task.
                warnings.filterwarnings("ignore", "A worker was restarted", UserWarning)
                # Ctrl-C reaches this process alone, which then ends the other one.
                with no_interrupt():
                    future = self._executor.submit(function, *args)
                return future.result()
        except BrokenProcessPool as error:
            self.close()
            code = re.search(r"exit codes of the workers are \{(.*?)\}", str(error))
            ended = f" with {code[1]}" if code else ""
            raise PlannerCrashed(
                f"the process that planned it ended{ended}: the compiler crashed, or was killed for lack of memory on "
                "this machine; the other targets are planned all the same"
            ) from error

    def close(self) -> None:
        """Ends the process."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)

    def __enter__(self) -> PlannerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
