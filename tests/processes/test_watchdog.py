"""Deadlines of a process that is alive but does not get any further, and which process of several is the stuck one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import jdpo
from jdpo.cli.cluster import deadlines_of
from jdpo.config import WatchdogConfig
from jdpo.exit_codes import PREEMPTED, STALLED
from jdpo.processes.last_line import write_stacks
from jdpo.processes.process_progress import Progress, State
from jdpo.processes.stalls import describe_stall, is_stalled, stuck_processes
from jdpo.processes.watch import _state_in
from jdpo.processes.watchdog import Deadlines, Watchdog, bytes_moved, is_debugged

DEADLINES = Deadlines(step=300.0, compile=3600.0, evaluation=1800.0)


class Clock:
    """A process with a clock that tests set, whose watchdog looks once a second as in a run."""

    def __init__(self, deadlines: Deadlines | None = DEADLINES) -> None:
        self.progress, self.now, self.moved, self.debugged = Progress(), 0.0, 0, False
        self._watchdog = Watchdog(
            self.progress, deadlines, self.now, moved=lambda: self.moved, debugged=lambda: self.debugged
        )

    def after(self, seconds: int, each: Callable[[], object] = lambda: None) -> State:
        """Lets time pass, calls `each` every second, and returns the state at the end."""
        state = self._watchdog.sample(self.now)
        for _ in range(seconds):
            self.now += 1.0
            each()
            state = self._watchdog.sample(self.now)
        return state

    def suspended(self, seconds: float) -> State:
        """Returns the state after a time in which the process did not run."""
        self.now += seconds
        return self._watchdog.sample(self.now)


def test_a_step_may_take_ten_times_the_median_and_at_least_five_minutes() -> None:
    clock = Clock()
    clock.progress.enter("step")
    assert clock.after(1000).left > 0, "the first steps may load programs and connect devices"
    for _ in range(50):
        clock.progress.launched(1)
        clock.progress.took(0.2)
    assert clock.after(299).left > 0
    assert clock.after(2).left < 0
    for _ in range(100):
        clock.progress.took(60.0)
    assert clock.after(598).left > 0
    assert clock.after(3).left < 0


def test_one_slow_step_does_not_change_the_deadline() -> None:
    progress = Progress()
    progress.enter("step")
    for seconds in (50.0, 50.0, 5000.0, 50.0):
        progress.took(seconds)
    assert DEADLINES.of(progress) == 500.0


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [("start", 1800.0), ("compile", 3600.0), ("evaluation", 1800.0), ("save", 3600.0), ("export", 7200.0)]
    + [(phase, 3600.0) for phase in ("data", "reference", "load", "data_wait", "sampling", "other")],
)
def test_every_phase_has_a_deadline(phase: str, seconds: float) -> None:
    clock = Clock(Deadlines())
    clock.progress.enter(phase)
    assert clock.after(1).left == seconds - 1


def test_a_phase_that_advances_may_last_for_hours() -> None:
    clock = Clock()
    clock.progress.enter("evaluation")
    assert clock.after(20_000, lambda: clock.progress.made("evaluation")).idle <= 1.0
    # Progress of another phase is that of a background thread, such as one that compiles.
    assert clock.after(1900, lambda: clock.progress.made("compile")).left < 0


def test_reading_and_writing_counts_where_large_files_are_read_and_written() -> None:
    def move() -> None:
        clock.moved += 10**6

    clock = Clock()
    for phase in ("start", "load", "save", "export"):  # at the start, a finished run comes back from its mirror
        clock.progress.enter(phase)
        assert clock.after(10_000, move).left > 0, phase
    clock.progress.enter("evaluation")
    assert clock.after(1900, move).left < 0, "the log and the report are written in every phase"


def test_the_log_and_the_report_alone_are_no_progress() -> None:
    def log() -> None:
        clock.moved += 4000  # a page of 1 MB every few minutes

    clock = Clock()
    clock.progress.enter("save")
    assert clock.after(3700, log).left < 0


def test_time_in_which_the_process_did_not_run_does_not_count() -> None:
    clock = Clock()
    clock.progress.enter("evaluation")
    clock.after(10)
    assert clock.suspended(100_000.0).idle <= 12.0


def test_time_in_a_debugger_does_not_count() -> None:
    clock = Clock()
    clock.progress.enter("evaluation")
    clock.debugged = True
    assert clock.after(3000).left >= 0
    clock.debugged = False
    assert clock.after(2).left < 0


def test_without_deadlines_no_process_is_stuck() -> None:
    assert deadlines_of(WatchdogConfig(enabled=False)) is None
    clock = Clock(deadlines_of(WatchdogConfig(enabled=False)))
    assert clock.after(5000).left == float("inf")
    assert deadlines_of(WatchdogConfig()) == Deadlines(), "the defaults of the config are those of the code"


def test_the_prompt_of_a_debugger_is_recognised() -> None:
    assert not is_debugged()
    found = threading.Event()

    def ask() -> None:
        if is_debugged():
            found.set()

    looking = {"__name__": "pdb", "threading": threading, "ask": ask}
    exec("thread = threading.Thread(target=ask)\nthread.start()\nthread.join()", looking)
    assert found.is_set(), "pdb waits for a command on the main thread"


@pytest.mark.parametrize("name", [None, 3, "pdbs"])
def test_code_of_any_name_is_no_debugger(name: object) -> None:
    found: list[bool] = []
    exec("found.append(is_debugged())", {"__name__": name, "found": found, "is_debugged": is_debugged})
    assert found == [False]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes of a process")
def test_bytes_moved_are_those_of_this_process(tmp_path: Path) -> None:
    before = bytes_moved()
    (tmp_path / "file").write_bytes(b"0" * 10**6)
    assert bytes_moved() - before >= 10**6


# --- several processes


def state(phase: str = "step", step: int = 13, *, point: int = 0, left: float = -1.0, idle: float = 301.0) -> State:
    return State(phase, step, point, left, idle, 0)


def test_a_run_is_stalled_when_no_process_has_time_left() -> None:
    assert is_stalled({0: state(), 1: state("evaluation")})
    # It writes the model, and the others wait for it.
    assert not is_stalled({0: state("export", left=3000.0, idle=2.0), 1: state("export")})
    assert not is_stalled({0: state(), 1: None}), "silence has a deadline of its own"


def test_the_process_behind_the_others_is_the_stuck_one() -> None:
    states = {index: state() for index in range(4)} | {2: state("evaluation", 12)}
    stuck, text = describe_stall(states, lambda index: f"(host node{index}) ")
    assert stuck == [2]
    assert "process 2 of this run (host node2) is stuck: in phase evaluation of step 12 for 301 s" in text
    assert "processes 0, 1 and 3 wait for it, in phase step of step 13" in text


def test_within_a_step_the_process_in_an_earlier_phase_is_the_stuck_one() -> None:
    assert stuck_processes({0: state("save", point=3), 1: state("other", point=2)}) == [1]


def test_at_the_same_point_the_stuck_process_is_the_one_that_stopped_first() -> None:
    assert stuck_processes({0: state(idle=300.0), 1: state(idle=340.0), 2: state(idle=301.0)}) == [1]
    assert stuck_processes({0: state(idle=300.0), 1: state(idle=301.0)}) == []
    stuck, text = describe_stall({0: state(), 1: state()}, lambda _: "")
    assert not stuck
    assert "all processes of this run are stuck" in text


def test_a_heartbeat_carries_the_state() -> None:
    known = State("evaluation", 12, 3, float("inf"), 3.5, 15, True)
    assert _state_in(f"7 {known}") == known
    assert _state_in(f"7 {known} suspects") == known
    assert [_state_in(beat) for beat in (None, "7", "left")] == [None] * 3


# --- the end


def test_stacks_are_written_next_to_the_run(tmp_path: Path) -> None:
    sentence = write_stacks(tmp_path / "stalls", "process-0.txt", parents=True)
    stacks = (tmp_path / "stalls" / "process-0.txt").read_text()
    assert "test_stacks_are_written_next_to_the_run" in stacks
    assert str(tmp_path / "stalls" / "process-0.txt") in sentence
    # A run that has no folder yet has its stacks elsewhere.
    elsewhere = write_stacks(tmp_path / "none" / "stalls", "process-0.txt", parents=True)
    assert not (tmp_path / "none").exists()
    assert "process-0.txt" in elsewhere


STUCK = """
import sys, time
from pathlib import Path
from jdpo.processes import PROGRESS, Deadlines, guarded

with guarded(Deadlines(start=1.0) if sys.argv[1] == "watched" else None, Path(sys.argv[2]), lambda: "Start it again."):
    print("ready", flush=True)
    time.sleep(1000)
"""


def stuck(*words: object) -> subprocess.Popen[str]:
    """Starts a process that is stuck while it starts."""
    return subprocess.Popen(
        [sys.executable, "-c", STUCK, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(jdpo.__file__).parents[1])},
    )


@pytest.mark.ci
def test_a_stuck_process_ends_with_its_stacks_and_one_line(tmp_path: Path) -> None:
    process = stuck("watched", tmp_path)
    _, line = process.communicate(timeout=200)
    assert process.returncode == STALLED
    (stacks,) = (tmp_path / "stalls").iterdir()
    assert "<string>" in stacks.read_text(), "the main thread"
    assert line.startswith("jdpo: error: this process ")
    assert line.count("\n") == 1
    assert "is stuck: in phase start before the first step" in line
    assert f"{stacks}. Start it again." in line


@pytest.mark.ci
def test_a_process_with_nothing_to_save_leaves_soon_after_a_signal(tmp_path: Path) -> None:
    process = stuck("unwatched", tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, line = process.communicate(timeout=200)
    assert process.returncode == PREEMPTED
    assert "stopped by SIGTERM while it started; nothing was left to save" in line
