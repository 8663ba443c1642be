"""Deadlines for a process that is alive but does not get any further.

A deadline counts from the last sign of progress, so that a phase may last for hours as long as it advances: each step,
batch of an evaluation, compiled program and block of rows is a sign, and so are bytes read or written in phases that
read or write large files. Time in which the process did not run (suspended, stopped) or is being debugged does not
count.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jdpo.processes.process_progress import Progress, State

_LONGEST_TICK = 2.0
"""A longer time between two samples means that this process did not run."""
_MOVED_BYTES = 64 * 2**20
"""Bytes that count as progress; the log and the report of a run write far less within any deadline."""
_MOVING_PHASES = ("start", "data", "reference", "load", "save", "export")
_DEBUGGERS = ("bdb", "pdb", "IPython", "debugpy", "pydevd", "_pydevd_bundle", "code")


class Deadlines(NamedTuple):
    """Seconds without progress after which a process counts as stuck, by phase.

    Attributes:
      step: at least this for a step.
      step_factor: and at least this many times the median of the last steps.
      other: for all phases that are not named here.
    """

    step_factor: float = 10.0
    step: float = 300.0
    start: float = 1800.0
    compile: float = 3600.0
    evaluation: float = 1800.0
    save: float = 3600.0
    export: float = 7200.0
    other: float = 3600.0

    def of(self, progress: Progress) -> float:
        """Returns the deadline of the current phase.

        >>> progress = Progress()
        >>> progress.enter("step")
        >>> Deadlines().of(progress)  # the first steps may still wait for programs
        3600.0
        >>> for _ in range(3):
        ...     progress.took(40.0)
        >>> Deadlines().of(progress)
        400.0
        """
        if progress.phase == "step":
            median = progress.median_step
            return self.compile if median is None else max(self.step, self.step_factor * median)
        named = ("start", "compile", "evaluation", "save", "export")
        return float(getattr(self, progress.phase)) if progress.phase in named else self.other


class Watchdog:
    """Counts the seconds since this process last made progress."""

    def __init__(
        self,
        progress: Progress,
        deadlines: Deadlines | None,
        now: float,
        *,
        moved: Callable[[], int] | None = None,
        debugged: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
          deadlines: None: no deadline ever passes.
          now: a monotonic time in seconds.
          moved: returns the bytes that this process has read and written so far. Default: as Linux counts them.
          debugged: returns True if a person may be looking at this process in a debugger.
        """
        self._progress, self._deadlines, self._now = progress, deadlines, now
        self._moved, self._debugged = moved or bytes_moved, debugged or is_debugged
        self._count, self._bytes, self._idle = progress.count, self._moved(), 0.0

    def sample(self, now: float) -> State:
        """Returns the state of this process; call it more often than every 2 seconds."""
        progress = self._progress
        elapsed, self._now = min(now - self._now, _LONGEST_TICK), now
        deadline = float("inf") if self._deadlines is None else self._deadlines.of(progress)
        if progress.count != self._count or self._has_moved():
            self._count, self._bytes, self._idle = progress.count, self._moved(), 0.0
        # Asked only when it matters, since it looks at the stack of the main thread.
        elif self._idle + elapsed <= deadline or not self._debugged():
            self._idle += elapsed
        signal = progress.stop_signal or 0
        return State(
            progress.phase, progress.step, progress.point, deadline - self._idle, self._idle, signal, progress.may_leave
        )

    def _has_moved(self) -> bool:
        return self._progress.phase in _MOVING_PHASES and self._moved() - self._bytes >= _MOVED_BYTES


def bytes_moved() -> int:
    """Returns the bytes that this process has read and written, also from the system's cache; 0 except on Linux."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["wchar"])


def is_debugged() -> bool:
    """Returns True if a debugger is attached to this process or its main thread is at the prompt of one."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines()):
            return True
    except OSError:  # not Linux
        pass
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        # Code that was given to exec may have any name, or None.
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
