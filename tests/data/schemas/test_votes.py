"""Two answers and a vote."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jdpo.data.schemas.formats import TIED, Dropped, Reading, completion_rows, preference_rows, schema_name
from jdpo.data.schemas.messages import assistant, user
from jdpo.types import CompletionRow, PreferenceRow

ASK, MORE = user("Name a river."), user("Another?")
SEINE, DUBLIN = assistant("The Seine."), assistant("Dublin.")

TEXTS = {"prompt": "Name a river."}
ARENA = {**TEXTS, "model_a": "First-7B", "model_b": "second-7b", "response_a": "The Seine.", "response_b": "Dublin."}
NUMBERED = {**TEXTS, "response_0": "The Seine.", "response_1": "Dublin."}
FROM_ONE = {**TEXTS, "response_1": "The Seine.", "response_2": "Dublin."}

FIRST = PreferenceRow([ASK], [SEINE], [DUBLIN], "x:1")
SECOND = PreferenceRow([ASK], [DUBLIN], [SEINE], "x:1")


def read(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> PreferenceRow | Dropped:
    (row,) = preference_rows(raw, "x:1", Reading(column_map))
    return row


@pytest.mark.parametrize(
    ("answers", "column", "first", "second"),
    [
        (ARENA, "winner", "model_a", "model_b"),
        (ARENA, "winner", "Model A", "MODEL B"),
        (ARENA, "winner", "a", "B"),
        (ARENA, "winner", "response_a", "response_b"),
        (ARENA, "winner", "assistant_a", "assistant_b"),
        (ARENA, "winner", "first-7b", "second-7b"),
        (ARENA, "preference", "A", "B"),
        (ARENA, "overall_preference", -1, 3),
        (ARENA, "overall_preference", "A", "B"),
        (NUMBERED, "better_response_id", 0, 1),
        (NUMBERED, "safer_response_id", "0", "1"),
        (NUMBERED, "better_response_id", 0.0, 1.0),
        (NUMBERED, "winner", "response_0", "response_1"),
        (FROM_ONE, "overall_preference", -3, 2),
        (FROM_ONE, "preference_strength", "-1", "1.0"),
        (FROM_ONE, "preference", 1, 2),
        (FROM_ONE, "winner", "response_1", "2"),
        ({"instruction": "Name a river.", "output_1": "The Seine.", "output_2": "Dublin."}, "preference", 1, 2),
        ({"question": "Name a river.", "answer_A": "The Seine.", "answer_B": "Dublin."}, "preferred", "A", "B"),
        ({"context": [ASK], "response1": "The Seine.", "response2": "Dublin."}, "overall_preference", -2, 1),
        ({"messages": [ASK], "completion_a": [SEINE], "completion_b": [DUBLIN]}, "choice", "a", "b"),
    ],
)
def test_a_vote_says_which_side_is_chosen(answers: dict[str, Any], column: str, first: Any, second: Any) -> None:
    assert read({**answers, column: first}) == FIRST
    assert read({**answers, column: second}) == SECOND
    assert completion_rows({**answers, column: second, "n": None}, "x:1") == [CompletionRow([ASK], [DUBLIN], "x:1")]
    assert schema_name({**answers, column: first}) == "votes"


@pytest.mark.parametrize(
    ("answers", "column", "tie"),
    [
        *((ARENA, "winner", tie) for tie in ("tie", "tie (bothbad)", "Tie (both bad)", "both_bad", "bothbad", "draw")),
        (ARENA, "winner", "neither"),
        (NUMBERED, "better_response_id", "tie"),
        (FROM_ONE, "overall_preference", 0),
        (FROM_ONE, "preference_strength", "0"),
    ],
)
def test_ties_are_counted_as_ties_and_not_learnt(answers: dict[str, Any], column: str, tie: Any) -> None:
    for rows in (preference_rows({**answers, column: tie}, "x:1"), completion_rows({**answers, column: tie}, "x:1")):
        assert rows == [Dropped(TIED, "x:1", f"{column} is {tie!r}")]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((1, 0, 0), FIRST),
        ((0, 1, 0), SECOND),
        (("0", "1", "0"), SECOND),
        ((True, False, False), FIRST),
        ((0.0, 0.0, 1.0), Dropped(TIED, "x:1")),
    ],
)
def test_columns_of_zero_and_one(marks: tuple[Any, Any, Any], expected: Any) -> None:
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    assert read({**ARENA, **dict(zip(names, marks, strict=True))}) == expected
    assert read({**ARENA, "winner_model_a": 0, "winner_model_b": 0}) == Dropped(TIED, "x:1")
    both_bad = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0, "winner_tie_bothbad": 1}
    assert read({**ARENA, **both_bad}) == Dropped(TIED, "x:1")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {**ARENA, "winner": "model_c"},
            r"^x:1: winner is 'model_c'; expected response_a or response_b, a or b, or t",
        ),
        ({**ARENA, "winner": 1}, r"^x:1: winner is 1; expected response_a"),
        ({**NUMBERED, "better_response_id": 2}, r"^x:1: better_response_id is 2; expected response_0 or response_1, 0"),
        ({**NUMBERED, "better_response_id": True}, r"^x:1: better_response_id is True"),
        ({**FROM_ONE, "preference": 0}, r"^x:1: preference is 0; expected response_1 or response_2, 1 or 2, or tie$"),
        (
            {**FROM_ONE, "overall_preference": 9},
            r"^x:1: overall_preference is 9; .* -3 \(response_1 is much better",
        ),
        ({**FROM_ONE, "overall_preference": float("nan")}, r"^x:1: overall_preference is nan"),
        (
            {**ARENA, "winner_model_a": 1, "winner_model_b": 1},
            r"^x:1: winner_model_a is 1, .*; expected 1 in one",
        ),
        (
            {**ARENA, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0},
            r"^x:1: winner_model_a is 0, .*; expected 1 in one",
        ),
        (
            {**ARENA, "winner_model_a": 1, "winner_other": 0},
            r"^x:1: winner_model_a is 1, winner_other is 0; exp",
        ),
        ({**ARENA, "winner_model_a": 2, "winner_model_b": 0}, r"^x:1: winner_model_a is 2, "),
    ],
)
def test_a_vote_for_no_answer_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_rows(raw, "x:1")


def test_votes_that_differ_are_an_error_until_one_is_picked() -> None:
    raw = {**NUMBERED, "better_response_id": 0, "safer_response_id": 1}
    with pytest.raises(ValueError, match=r"^x:1: the votes of the row differ .*\{better_response_id"):
        preference_rows(raw, "x:1")
    for picked, expected in (("better_response_id", FIRST), ("safer_response_id", SECOND)):
        for name in (picked, "winner", "better_response_id"):
            assert read(raw, {name: picked}) == expected
    assert read({**raw, "safer_response_id": 0}) == FIRST
    arena = {**ARENA, "winner": "model_a", "winner_model_a": 0, "winner_model_b": 1}
    with pytest.raises(ValueError, match="the votes of the row differ"):
        preference_rows(arena, "x:1")
    assert read(arena, {"winner": "winner"}) == FIRST


def test_a_strength_keeps_its_sign_whatever_a_column_map_calls_it() -> None:
    assert read({**FROM_ONE, "overall_preference": 1}, {"winner": "overall_preference"}) == SECOND
    assert read({**FROM_ONE, "how much": -1}, {"overall_preference": "how much"}) == FIRST


def test_whole_conversations_and_their_common_turns() -> None:
    turns = {"conversation_a": [ASK, SEINE, MORE, SEINE], "conversation_b": [ASK, SEINE, MORE, DUBLIN]}
    assert read({**turns, "winner": "model_b"}) == PreferenceRow([ASK, SEINE, MORE], [DUBLIN], [SEINE], "x:1")
    other = {**turns, "conversation_b": [ASK, DUBLIN, MORE, DUBLIN]}
    row = read({**other, "winner": "model_b"})
    assert isinstance(row, Dropped)


@pytest.mark.parametrize("write", [json.dumps, list])
def test_rounds_in_lists_of_texts(write: Any) -> None:
    raw = {"prompt": write(["Name a river."]), "response_a": write(["The Seine."]), "response_b": write(["Dublin."])}
    assert read({**raw, "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}) == SECOND
    two = {
        "prompt": write(["Name a river.", "Another?"]),
        "response_a": write(["The Seine.", "The Seine."]),
        "response_b": write(["The Seine.", "Dublin."]),
        "winner": "a",
    }
    assert read(two) == PreferenceRow([ASK, SEINE, MORE], [SEINE], [DUBLIN], "x:1")
    with pytest.raises(ValueError, match=r"^x:1: prompt has 2 rounds and response_b 1"):
        preference_rows({**two, "response_b": write(["The Seine."])}, "x:1")


def test_sides_that_are_named_come_before_votes() -> None:
    assert read({**ARENA, "winner": "model_b", "chosen": [SEINE], "rejected": [DUBLIN]}) == FIRST


def test_a_vote_without_two_answers_is_refused() -> None:
    for raw in (
        {"prompt": "?", "response_a": "x", "winner": "a"},
        {"response_a": "x", "response_b": "y", "winner": "a"},
    ):
        with pytest.raises(ValueError, match="the columns fit no known format"):
            preference_rows(raw, "x:1")
