"""The progress of this process: read by its watchdog, and published for the other processes of its run."""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

_RECENT_STEPS = 100
_FEWEST_STEPS = 3
"""The first steps load programs and connect the devices, so they say little about the later ones."""


class State(NamedTuple):
    """The state of a process, as the others see it.

    Attributes:
      phase: see `jdpo.training.logs.phases`; "start" before the first one.
      step: the last step that was launched; 0 before the first.
      point: signs of progress since then, as many on every process that has come to the same line of the code.
      left: seconds until the deadline of the phase passes without progress; negative once it has passed.
      idle: seconds since the last sign of progress.
      signal: the signal that asked the process to stop; 0 if none did.
      may_leave: see `Progress`.
    """

    phase: str
    step: int
    point: int
    left: float
    idle: float
    signal: int
    may_leave: bool = False

    def __str__(self) -> str:
        return f"{self.phase} {self.step} {self.point} {self.left:.1f} {self.idle:.1f} {self.signal} {self.may_leave:d}"

    @classmethod
    def parse(cls, words: list[str]) -> State:
        """Reads the words of `str(state)`."""
        phase, step, point, left, idle, signal, may_leave = words
        return cls(phase, int(step), int(point), float(left), float(idle), int(signal), may_leave == "1")


class Progress:
    """The phase of the main thread and its signs of progress.

    Attributes:
      phase, step, point: see `State`.
      count: changes with every sign of progress.
      stop_signal: the signal that asked this process, or another one of its run, to stop.
      is_ending: all processes have agreed to stop, and end in order.
    """

    phase: str
    step: int
    point: int
    count: int
    stop_signal: int | None
    is_ending: bool

    def __init__(self) -> None:
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.begin()

    def begin(self) -> None:
        """Forgets an earlier run of this process."""
        self.phase, self.step, self.point, self.count, self.stop_signal = "start", 0, 0, 0, None
        self.is_ending = False
        self._step_seconds.clear()

    def enter(self, phase: str) -> None:
        """Begins a phase."""
        self.phase = phase
        # Waiting for a batch may be interrupted by reading the report of a step, on one process and not on another.
        self.point += phase not in ("step", "data_wait")
        self.count += 1

    def made(self, phase: str, *, alike: bool = True) -> None:
        """Notes progress within a phase; ignored in any other phase, as it may be that of a background thread.

        Args:
          alike: every process calls this equally often.
        """
        if phase == self.phase:
            self.count += 1
            self.point += alike and phase != "compile"  # threads compile, in no fixed order

    def launched(self, step: int) -> None:
        """Notes that a step was launched."""
        self.step, self.point = step, 0
        self.count += 1

    def took(self, seconds: float) -> None:
        """Notes the time of a step that has ended."""
        self._step_seconds.append(seconds)
        self.count += 1

    @property
    def median_step(self) -> float | None:
        """Median seconds of the last steps; None while there are too few."""
        known = list(self._step_seconds)  # another thread may append meanwhile
        return statistics.median(known) if len(known) >= _FEWEST_STEPS else None

    @property
    def keeps_nothing_back(self) -> bool:
        """True while the process may end at any time without losing a step that was trained since the last save."""
        return self.step == 0 or self.phase == "export"

    @property
    def may_leave(self) -> bool:
        """True if the process was asked to stop, has not begun to, and would lose nothing if it ended now."""
        return self.stop_signal is not None and self.keeps_nothing_back and not self.is_ending


PROGRESS = Progress()
"""The progress of this process, which makes one run at a time."""
