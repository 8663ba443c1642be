"""jdpo's tokens against what TRL's DPOTrainer made of the same rows (tests/golden/token_parity)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

from make_golden_token_parity import GOLDEN, GOLDEN_ARMS, MAX_LENGTH, folder_of  # noqa: E402
from token_parity import (  # noqa: E402
    BOS_TWICE,
    EQUAL,
    NEITHER,
    UNEXPLAINED,
    Row,
    explain,
    is_explained,
    jdpo_tokens,
    render,
    tally,
    trl_row,
    trl_tokens,
)

from jdpo.data.schemas.formats import EMPTY_SIDE, Dropped  # noqa: E402
from jdpo.data.tokens.boundaries import IDENTICAL_SIDES  # noqa: E402
from jdpo.data.tokens.prompt_end import SHORTER_PREFIX  # noqa: E402
from jdpo.data.tokens.row_notes import ANSWER_CHANGED, SPELLS_SPECIAL, TOOLS_UNUSED  # noqa: E402
from jdpo.data.tokens.tokenize import COMPLETION_CUT, KeptPair  # noqa: E402

ONLY_OURS = {f"dropped by jdpo alone: {reason}": 1 for reason in (EMPTY_SIDE, IDENTICAL_SIDES)}
SPACES_AT_ENDS, TOOLS, LONG_PROMPT_ROW, LONG_ANSWER = 6, 8, 11, 12
"""Rows of the golden file."""


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with (GOLDEN / "rows.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def trls(arm: str) -> dict[int, Row]:
    with (folder_of(GOLDEN, arm) / "tokens.jsonl").open(encoding="utf-8") as lines:
        return {record.pop("index"): record for record in map(json.loads, lines)}


@pytest.mark.parametrize("arm", GOLDEN_ARMS)
def test_every_row_equals_trls_or_differs_for_a_known_reason(rows: list[Row], arm: str) -> None:
    folder = folder_of(GOLDEN, arm)
    ours = jdpo_tokens(folder, rows, MAX_LENGTH)
    found = tally(rows, trls(arm), ours, folder, MAX_LENGTH)
    long_prompts = sum(index not in trls(arm) for index in range(len(rows)))
    kept = {BOS_TWICE if arm == "BOS twice" else EQUAL: len(rows) - 2 - long_prompts}
    assert found.outcomes == {**kept, **ONLY_OURS, **({NEITHER: long_prompts} if long_prompts else {})}
    assert is_explained(found) == (arm != "BOS twice")
    long_answer = ours[LONG_ANSWER]
    assert isinstance(long_answer, KeptPair)
    assert len(long_answer.row.prompt_ids) + len(long_answer.row.chosen_ids) <= MAX_LENGTH


def test_notes_of_special_rows_are_counted(rows: list[Row]) -> None:
    def notes(arm: str) -> dict[str, int]:
        folder = folder_of(GOLDEN, arm)
        return dict(tally(rows, trls(arm), jdpo_tokens(folder, rows, MAX_LENGTH), folder, MAX_LENGTH).notes)

    assert notes("Qwen 2.5")[SPELLS_SPECIAL] == 1
    assert TOOLS_UNUSED not in notes("Qwen 2.5")
    assert notes("ChatML")[TOOLS_UNUSED] == 1
    assert notes("Llama 3")[ANSWER_CHANGED] == 2  # it trims answers
    assert ANSWER_CHANGED not in notes("ChatML")


def test_the_golden_rows_cover_their_special_cases(rows: list[Row]) -> None:
    by_arm = {arm: jdpo_tokens(folder_of(GOLDEN, arm), rows, MAX_LENGTH) for arm in GOLDEN_ARMS}
    notes = [
        note
        for results in by_arm.values()
        for result in results
        if isinstance(result, KeptPair)
        for note in result.notes
    ]
    assert {COMPLETION_CUT, SHORTER_PREFIX, SPELLS_SPECIAL} <= set(notes)
    assert any(isinstance(results[LONG_PROMPT_ROW], Dropped) for results in by_arm.values())
    tools = by_arm["Qwen 2.5"][TOOLS]
    assert isinstance(tools, KeptPair)
    assert len(tools.row.prompt_ids) > 120  # it contains the tools


def test_a_difference_without_a_reason_is_seen(rows: list[Row]) -> None:
    folder = folder_of(GOLDEN, "ChatML")
    theirs, ours = trls("ChatML"), jdpo_tokens(folder, rows, MAX_LENGTH)

    def outcome(index: int, theirs: Row | None, ours: KeptPair | Dropped) -> str:
        return explain(trl_row(rows[index]), theirs, ours, None, MAX_LENGTH)

    first = ours[0]
    assert isinstance(first, KeptPair)
    row = first.row
    wrong: list[Any] = [
        row._replace(chosen_ids=row.rejected_ids, rejected_ids=row.chosen_ids),
        row._replace(prompt_ids=row.prompt_ids[:-1], chosen_ids=np.append(row.prompt_ids[-1:], row.chosen_ids)),
        row._replace(chosen_ids=row.chosen_ids[:-1]),
        row._replace(prompt_ids=row.prompt_ids[1:]),
    ]
    assert outcome(0, theirs[0], first) == EQUAL
    for changed in wrong:
        assert outcome(0, theirs[0], first._replace(row=changed)) == UNEXPLAINED
    assert outcome(0, None, first) == UNEXPLAINED
    for reason in (EMPTY_SIDE, IDENTICAL_SIDES, "histories differ"):
        assert outcome(0, theirs[0], Dropped(reason, "x:1")) == UNEXPLAINED
    assert outcome(0, None, Dropped(EMPTY_SIDE, "x:1")) == UNEXPLAINED
    found = tally(rows[:1], {0: theirs[0] | {"chosen_ids": []}}, ours[:1], folder, MAX_LENGTH)
    assert not is_explained(found)
    assert "row 0: TRL {" in render("rows.jsonl", rows[:1], {("ChatML", MAX_LENGTH): found}, {"trl": "1.16"})


@pytest.mark.torch
@pytest.mark.parametrize("arm", ["ChatML", "Qwen 2.5"])
def test_the_golden_tokens_equal_those_of_the_installed_trl(rows: list[Row], arm: str, tmp_path: Path) -> None:
    assert trl_tokens(folder_of(GOLDEN, arm), rows, tmp_path / "tokens.jsonl", MAX_LENGTH) == trls(arm)
