"""Seconds per phase of a run, added up over its starts and kept in run.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Literal, TypeVar

from jdpo.processes import PROGRESS
from jdpo.training.fit.compilation import Programs
from jdpo.training.run_dir import RunDirectory

Phase = Literal[
    "data", "reference", "load", "compile", "data_wait", "step", "evaluation", "sampling", "save", "export", "other"
]
"""The work of the main thread of a run, or what it waits for; docs/running.md says what belongs to each."""

T = TypeVar("T")


class PhaseClock:
    """Measures in which phase a run is: always in exactly one, so that the phases add up to its wall-clock time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
          now: returns seconds.
        """
        self._now, self._seconds = now, dict[str, float]()
        self._phase: Phase = "other"
        self._since = now()
        self._programs: list[Programs] = []

    def enter(self, phase: Phase) -> None:
        """Begins a phase, which lasts until the next one begins."""
        PROGRESS.enter(phase)
        self._add_up(phase)

    def _add_up(self, phase: Phase) -> None:
        now = self._now()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """While entered, time belongs to this phase and not to the one around it."""
        around = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(around)

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; the time until each of them is there is `data_wait`."""
        iterator = iter(items)
        while True:
            with self.within("data_wait"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase of this start so far."""
        self._add_up(self._phase)  # not entered: this may be another thread, and is no progress
        return dict(self._seconds)

    def watch(self, programs: Programs) -> None:
        """Counts the programs among these that a step had to wait for, as nothing had prepared them."""
        self._programs.append(programs)

    @property
    def num_late(self) -> int:
        """Watched programs that were compiled in the middle of training."""
        return sum(programs.num_late for programs in self._programs)


class TimingRecord:
    """Keeps the times of a clock in run.json, in addition to those of the run's earlier starts."""

    def __init__(self, clock: PhaseClock, directory: RunDirectory, resources: ExitStack) -> None:
        """
        Args:
          resources: writes the times at its end, however the run ends.
        """
        self._clock, self._directory = clock, directory
        record = directory.record
        self._earlier, self._late_before = record.timing, record.late_programs or 0
        resources.callback(self.save)

    def save(self) -> None:
        """Writes the times up to now."""
        seconds = self._clock.seconds()
        names = dict.fromkeys((*self._earlier, *seconds))
        timing = {name: round(self._earlier.get(name, 0.0) + seconds.get(name, 0.0), 3) for name in names}
        # Measurements only: a full disk or a damaged run.json must neither end a run here nor hide what ends it.
        with contextlib.suppress(OSError, ValueError):
            self._directory.keep(timing=timing, late_programs=self._late_before + self._clock.num_late)
