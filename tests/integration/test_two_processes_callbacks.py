"""Rows and callbacks of Python code on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.cluster import run_cluster

HERE = Path(__file__).parent


@pytest.mark.full
def test_one_process_stops_both_and_the_rows_of_the_first_count(toy_model: Path, tmp_path: Path) -> None:
    for end in run_cluster([[HERE / "callbacks_by_two.py", toy_model, tmp_path]] * 2):
        assert end.code == 0, end.log
    first, second = (json.loads((tmp_path / f"result-{index}.json").read_text()) for index in range(2))
    assert (first[0], second[0]) == (3, 3), "the wish reaches the others one step later"
    assert (first[1], second[1]) == ("on another process", "enough")
    # Neither was interrupted; both have the same answers, the same end and the same losses.
    assert first[2:] == second[2:]
    assert first[4] == 8
    assert len(first[3]) == 2
