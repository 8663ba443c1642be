"""The exchange of facts between the processes of a cluster, through the key-value store of JAX's coordination service.

It needs no devices, so it works where these do not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

_FOLDER = "jdpo/doctor/"
_ROUNDS = 4
_LAST_SECONDS = 10.0


class FactExchange:
    """The exchange, as one process takes part in it. Every process makes the same calls in the same order.

    Attributes:
      process, count: index of this process and number of all.
    """

    def __init__(self, client: Any, *, process: int, count: int, timeout: float) -> None:
        """
        Args:
          client: JAX's coordination client; None for a process alone.
          process: index of this process.
          count: number of processes.
          timeout: seconds to wait for another process. A process that dies is noticed earlier, by
            `jdpo.processes.ending_together`.
        """
        self._client, self.process, self.count = client, process, count
        self._milliseconds = int(1000 * timeout)

    def from_first(self, name: str, make: Callable[[], str]) -> str:
        """Returns the text that `make` returns on process 0 on every process."""
        if self._client is None:
            return make()
        if self.process == 0:
            self._set(name, make())
        return self._get(name)

    def to_first(self, name: str, text: str) -> list[str]:
        """Returns the texts of all processes, in their order, on process 0; [] on the others."""
        if self._client is None:
            return [text]
        self._set(f"{name}/{self.process}", text)
        return [self._get(f"{name}/{process}") for process in range(self.count)] if self.process == 0 else []

    def all_agree(self, name: str, mine: bool) -> bool:
        """Returns True on every process if `mine` is True on all."""
        texts = self.to_first(name, str(mine))
        return self.from_first(f"{name}/all", lambda: str(set(texts) == {str(True)})) == str(True)

    def wait(self, name: str) -> None:
        """Waits until all processes have called it."""
        if self._client is not None:
            self._client.wait_at_barrier(f"{_FOLDER}{name}", self._milliseconds)

    def part(self, name: str) -> None:
        """Waits a short time until all processes have called it; then process 0 may end, and the store with it."""
        if self._client is not None:
            with contextlib.suppress(Exception):  # a process is gone; this one is to end in any case
                self._client.wait_at_barrier(f"{_FOLDER}{name}", int(1000 * _LAST_SECONDS))

    def clock_offset(self) -> tuple[float, float]:
        """Returns the seconds by which this process's clock is ahead of that of process 0, and their uncertainty."""
        if self._client is None:
            return 0.0, 0.0
        if self.process == 0:
            # One process after the other: answers to all at once would wait for each other.
            for process in range(1, self.count):
                for number in range(_ROUNDS):
                    self._get(f"asked/{process}/{number}")
                    self._set(f"told/{process}/{number}", repr(time.time()))
            return 0.0, 0.0
        rounds = []
        for number in range(_ROUNDS):
            sent = time.time()
            self._set(f"asked/{self.process}/{number}", "")
            told = float(self._get(f"told/{self.process}/{number}"))
            rounds.append((sent, told, time.time()))
        return offset_of(rounds)

    def _set(self, name: str, text: str) -> None:
        self._client.key_value_set(_FOLDER + name, text)

    def _get(self, name: str) -> str:
        return str(self._client.blocking_key_value_get(_FOLDER + name, self._milliseconds))


def offset_of(rounds: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Returns the offset of a clock and its uncertainty, in seconds, from round trips.

    Args:
      rounds: (time when a question was sent, time of the other clock that was told, time when the answer came).

    The shortest round trip says most: the other clock was read somewhere within it.

    >>> offset_of([(10.0, 7.5, 11.0), (20.0, 17.25, 20.5)])
    (3.0, 0.25)
    """
    sent, told, received = min(rounds, key=lambda times: times[2] - times[0])
    return (sent + received) / 2 - told, (received - sent) / 2
