"""The pace of answers: tokens per second, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from jdpo.words import clock


class Pace:
    """Logs at intervals how many answers there are, how fast they come, and how long the rest will take."""

    def __init__(self, total: int, log: Callable[[str], None], *, seconds: float = 10.0) -> None:
        """
        Args:
          total: number of answers that are wanted.
          log: receives the lines.
          seconds: time between two lines.
        """
        self.total, self.done, self.fresh, self.num_tokens = total, 0, 0, 0
        self._log, self._seconds = log, seconds
        self._started = self._logged = time.monotonic()

    def skip(self, num_answers: int) -> None:
        """Counts answers that are there already; the clock starts now."""
        self.done += num_answers
        self._started = self._logged = time.monotonic()

    def __call__(self, num_tokens: int = 0) -> None:
        """Counts an answer, and logs a line if one is due.

        Args:
          num_tokens: tokens of the answer; 0: unknown.
        """
        self.done += 1
        self.fresh += 1
        self.num_tokens += num_tokens
        if (now := time.monotonic()) >= self._logged + self._seconds:
            self._logged = now
            self._log(self.line(now - self._started))

    def line(self, elapsed: float) -> str:
        """Returns the line for a time in seconds since the start.

        >>> pace = Pace(8, print)
        >>> pace.skip(4)
        >>> pace(100); pace(300)
        >>> pace.line(4.0)
        '6 of 8 answers, 100 tokens per second, 0:00:04 left'
        """
        elapsed = max(elapsed, 1e-6)
        tokens = f", {self.num_tokens / elapsed:,.0f} tokens per second" if self.num_tokens else ""
        left = elapsed / max(self.fresh, 1) * max(self.total - self.done, 0)
        return f"{self.done:,} of {self.total:,} answers{tokens}, {clock(left)} left"
