"""run.json: written and read back, and read in the form of older versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jdpo.training.run_record import FitRecord, RunRecord

FIT = FitRecord(
    remat="dots", max_tokens_per_device=640, bytes_needed=None, limit=800, conditions={"jax": "0.10", "mesh": [1, 2]}
)
FULL = RunRecord(
    command="dpo",
    jdpo="0.1.0",
    started_in="/somewhere",
    finished=True,
    inputs={"the training rows": "ab"},
    files={"rows.jsonl": "cd"},
    rows="20 kept",
    reference="cached",
    fit=FIT,
    given_up=("4.damaged",),
    results={"step": 3, "loss": 0.5},
)

OLD = {
    "command": "dpo",
    "jdpo": "0.1.0",
    "finished": True,
    "inputs": {"the training rows": "ab"},
    "started_in": "/somewhere",
    "files": {"rows.jsonl": "cd"},
    "rows": "20 kept",
    "reference": "cached",
    "fit": {
        "remat": "dots",
        "max_tokens_per_device": 640,
        "bytes_needed": None,
        "limit": 800,
        "jax": "0.10",
        "mesh": [1, 2],
    },
    "given_up": ["4.damaged"],
    "results": {"step": 3, "loss": 0.5},
}
"""run.json of a version that kept it as a plain dict."""


@pytest.mark.parametrize("record", [FULL, RunRecord.of_new_run("sft")])
def test_a_record_is_read_back_as_it_was_written(record: RunRecord, tmp_path: Path) -> None:
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == record


def test_files_of_older_versions_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(OLD))
    assert RunRecord.read(path) == FULL
    FULL.write(path)
    assert json.loads(path.read_text()) == OLD
    path.write_text(json.dumps({"command": "dpo", "jdpo": "0.1.0", "finished": False, "inputs": {}, "later": 1}))
    assert RunRecord.read(path) == RunRecord(command="dpo", jdpo="0.1.0")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"x"',
        '{"inputs": 3}',
        '{"command": 1}',
        '{"reference": "x"}',
        '{"fit": 3}',
        '{"timing": {"step": "x"}}',
        '{"late_programs": [1]}',
    ],
)
def test_a_file_that_is_not_a_record_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"run\.json(: | was not written)",
    ):
        RunRecord.read(tmp_path / "run.json")


def test_a_record_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.finished = False  # type: ignore[misc]


def test_inputs_that_older_versions_called_otherwise_are_still_compared(tmp_path: Path) -> None:
    old_name = "how many rows each data set has"  # plain: as it is
    (tmp_path / "run.json").write_text(json.dumps(OLD | {"inputs": {old_name: "12 5"}}))
    assert RunRecord.read(tmp_path / "run.json").inputs == {"how many rows each dataset has": "12 5"}
