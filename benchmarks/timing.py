"""Times programs in turns, and gives the spread of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K")


def in_turns(programs: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, list[float]]:
    """Returns the seconds of every program; each runs once per round, so that load affects all equally.

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
    """Returns the interpolated 25th, 50th and 75th percentiles.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
