"""Programs timed in turns, and the spread of what they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K")


def in_turns(programs: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, list[float]]:
    """Seconds of every program, one run of each a round, so that load on the machine meets all alike.

    A round before the first is not counted. A program must wait for the end of its own work.
    """
    seconds: dict[K, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, run in programs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[1:] for name, taken in seconds.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile, interpolated.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
