"""The time of a run is divided among its phases, and kept over its starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jdpo.config import SFTConfig
from jdpo.training.logs.phases import PhaseClock, TimingRecord
from jdpo.training.run_dir import RunDirectory


def counter() -> Iterator[float]:
    yield from map(float, range(1000))


def ticking() -> PhaseClock:
    """A clock that is a second later each time it is read."""
    ticks = counter()
    return PhaseClock(lambda: next(ticks))


def test_phases_inside_of_others_are_subtracted() -> None:
    clock = ticking()
    clock.enter("evaluation")  # 1
    with clock.within("compile"):  # 2
        with clock.within("save"):  # 3
            pass  # 4
        pass  # 5
    # Read at 6.
    assert clock.seconds() == {"other": 1, "evaluation": 2, "compile": 2, "save": 1}


def test_a_phase_that_raises_is_left() -> None:
    clock = ticking()
    with pytest.raises(ValueError, match="no"), clock.within("save"):
        raise ValueError("no")
    assert clock.seconds() == {"other": 2, "save": 1}


def test_waiting_for_the_next_item_is_data_wait() -> None:
    clock = ticking()
    clock.enter("step")
    assert list(clock.waiting("ab")) == ["a", "b"]
    # Three waits, the last of which finds the end, and a step after each of the two items.
    assert clock.seconds() == {"other": 1, "step": 4, "data_wait": 3}


def fail_in_training(clock: PhaseClock, directory: RunDirectory) -> None:
    with ExitStack() as resources:
        timing = TimingRecord(clock, directory, resources)
        clock.enter("step")
        timing.save()
        raise RuntimeError("a device is lost")


def test_times_of_all_starts_are_added_however_a_run_ends(tmp_path: Path) -> None:
    config = SFTConfig(model_name_or_path="toy", datasets="rows.jsonl", output_dir=str(tmp_path / "run"), max_steps=4)
    for start in (1, 2):
        directory = RunDirectory(config, "sft")
        # A folder in which nothing was trained is free, and would be a new run.
        (directory.path / "metrics.jsonl").write_text('{"step": 1}\n')
        clock = ticking()
        with pytest.raises(RuntimeError, match="lost"):
            fail_in_training(clock, directory)
        directory.close()
        values = json.loads((directory.path / "run.json").read_text())
        # Read at 1, 2 and 3 in each start.
        assert values["timing"] == {"other": start, "step": 2 * start}
        assert values["late_programs"] == 0
