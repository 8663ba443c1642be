"""The time of a step excludes pauses."""

from __future__ import annotations

import time

from jdpo.training.step_reports import Stopwatch


def test_a_stopwatch_excludes_pauses() -> None:
    began, watch = time.perf_counter(), Stopwatch()
    with watch.paused():
        time.sleep(0.2)
    counted = watch.lap()
    assert 0 <= counted <= time.perf_counter() - began - 0.2
    time.sleep(0.05)
    assert watch.lap() >= 0.05
