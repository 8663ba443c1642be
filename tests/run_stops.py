"""Callbacks that tests give to `jdpo.train`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from jdpo import Callback, RunView


class SignalAt(Callback):
    """Sends this process a signal after a step, as a scheduler or Ctrl-C does."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self._step, self._signum = step, signum

    def on_step(self, run: RunView) -> None:
        if run.step == self._step:
            os.kill(os.getpid(), self._signum)


class EachStep(Callback):
    """Calls a function before the first update and after each."""

    def __init__(self, call: Callable[[RunView], object]) -> None:
        self._call = call

    def on_start(self, run: RunView) -> None:
        self._call(run)

    def on_step(self, run: RunView) -> None:
        self._call(run)
