"""Saves that are due by the clock: `save_minutes`."""

from __future__ import annotations

import time
from collections.abc import Callable

from jdpo.processes import is_first


class SaveTimer:
    """Tells when a checkpoint is due because the last one is too old."""

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
          minutes: the age at which a checkpoint is due; None: never.
          now: returns seconds.
        """
        self._seconds = None if minutes is None else 60 * minutes
        self._now, self._since = now, now()

    def is_due(self) -> bool:
        """Returns True once per interval, and on the first process only: clocks differ, so one of them counts."""
        due = self._seconds is not None and is_first() and self._now() - self._since >= self._seconds
        if due:
            # With several processes the save comes one step later, and must not be asked for again until then.
            self.restart()
        return due

    def restart(self) -> None:
        """Counts from now on, since a checkpoint is being saved."""
        self._since = self._now()
