"""A run is asked to stop after the current step by SIGTERM, Ctrl-C or SIGHUP (a closed terminal), or by a callback.

`jdpo.processes.guard` tells the processes of a run of a signal that came to one of them, and ends a process that has
nothing to save and takes too long to stop.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import jax

from jdpo.processes import PROGRESS, any_process, any_process_later

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def silence_lost_output() -> None:
    """Discards output that nobody can read any more: a print to a closed terminal would end a run unsaved."""
    for descriptor in (1, 2):
        asked = select.poll()
        asked.register(descriptor, 0)  # errors and hang-ups are always reported
        if asked.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class Agreed(NamedTuple):
    """The requests of at least one process of a run; alike on every process.

    Attributes:
      stop: to stop after the current step.
      save: to save a checkpoint.
      hurry: to stop because of a signal, after which the process may be killed within seconds.
    """

    stop: bool = False
    save: bool = False
    hurry: bool = False


class StopRequest:
    """While entered, a first signal asks the run to stop, and a second one has its default effect.

    Attributes:
      signum: the signal that asked, if one did.
      reason: why a callback asked, if one did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}
        self._answer: Callable[[], list[bool]] | None = None
        self._kept = Agreed()

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only, and refuses handlers from others.
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # under nohup the run outlives its terminal
                self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # The next signal has its default effect, so that a run that hangs can be ended.
        self._restore()
        silence_lost_output()
        with contextlib.suppress(OSError):
            # os.write, since a handler may run in the middle of any other print.
            when = "" if PROGRESS.keeps_nothing_back else " at the next step"
            os.write(2, f"\nstopping{when}; a second signal stops at once\n".encode())

    def interrupt(self) -> None:
        """Has the effect of a first Ctrl-C."""
        self._ask(signal.SIGINT, None)

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def ask(self, reason: str) -> None:
        """Asks the run to stop, from any thread; of several reasons the first one counts."""
        if self.reason is None:
            self.reason = reason

    @property
    def _signal(self) -> int | None:
        """The signal that came to this process, also before this object was entered, or to another one of the run."""
        return self.signum or PROGRESS.stop_signal

    def noticed(self) -> bool:
        """Returns True if this process knows that the run should stop; others may learn of it a little later."""
        return self._signal is not None or self.reason is not None

    def asked(self) -> bool:
        """Returns True if any process was asked to stop; every process gets the same answer."""
        return self._ends(any_process(self.noticed()))

    def signalled(self) -> bool:
        """Returns True if a signal asked any process to stop; every process gets the same answer."""
        return self._ends(any_process(self._signal is not None))

    def _ends(self, agreed: bool) -> bool:
        # From here on all processes end in order, and none may end before the others by itself.
        PROGRESS.is_ending = PROGRESS.is_ending or agreed
        return agreed

    def poll(self, *, save: bool = False) -> Agreed:
        """Asks all processes, and returns what they answered.

        With several processes the answer is that of the call before, so that none waits for the others.

        Args:
          save: this process asks for a checkpoint.
        """
        mine, kept = Agreed(self.noticed(), save, self._signal is not None), self._kept
        self._kept = Agreed()
        if jax.process_count() == 1:
            return mine
        # The last call's answer has arrived in the meantime; waiting for this one would cost a round trip per step.
        earlier, self._answer = self._answer, any_process_later(mine)
        answer = [False] * len(mine) if earlier is None else earlier()
        agreed = Agreed(*(one or other for one, other in zip(answer, kept, strict=True)))
        self._ends(agreed.stop)
        return agreed

    def breaks_off(self) -> bool:
        """Returns True if a signal asks to break off work within a step; every process must call this equally often."""
        # The answers are for `poll`, too, which is called at the end of the step.
        self._kept = self.poll()
        return self._kept.hurry

    @property
    def exit_code(self) -> int:
        """128 + signal, as in shells: 143 for SIGTERM, so that a scheduler does not count the job as done."""
        return 128 + (self._signal or signal.SIGTERM)
