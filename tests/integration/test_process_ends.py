"""How a run of several processes ends when one of them is killed, stopped, asleep or asked to stop.

The experiments are those of benchmarks/process_ends.py, which prints them as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jdpo.exit_codes import DONE, LOST, PREEMPTED, STALLED

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from process_ends import EXPERIMENTS, LOSSES, STOPS, Laboratory

KILLED = 137


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("process-ends"))


@pytest.mark.full
@pytest.mark.parametrize("name", [one.name for one in LOSSES])
def test_a_lost_or_stuck_process_ends_the_run(name: str, laboratory: Laboratory) -> None:
    experiment = EXPERIMENTS[name]
    outcome = laboratory.carry_out(experiment)
    victim = {"SIGKILL": KILLED, "SIGSTOP": None, "SLEEP": STALLED}[experiment.strike]
    # Where all stop at the same point, nothing tells which one is stuck.
    others = {STALLED, LOST} if experiment.strike == "SLEEP" else {LOST}
    assert outcome.codes[experiment.victim] == victim, outcome.logs
    assert {code for index, code in enumerate(outcome.codes) if index != experiment.victim} <= others, outcome.logs
    assert outcome.seconds < 60
    if experiment.strike == "SLEEP":
        assert "stuck: in phase" in outcome.line
        assert "/stalls/process-" in outcome.line


@pytest.mark.full
@pytest.mark.parametrize("name", [one.name for one in STOPS if one.point[0] != "jdpo.processes:join_cluster"])
def test_sigterm_to_one_process_ends_all_in_order(name: str, laboratory: Laboratory) -> None:
    outcome = laboratory.carry_out(EXPERIMENTS[name])
    # An export that is short is finished, and with it the run.
    expected = DONE if "short export" in name else PREEMPTED
    assert set(outcome.codes) == {expected}, outcome.logs
    assert outcome.seconds < 60
