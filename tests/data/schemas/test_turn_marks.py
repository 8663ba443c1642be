"""Marks of turns that are context only, not learnt: where files have them and how they are read."""

from __future__ import annotations

from typing import Any

import pytest

from jdpo.data.schemas.formats import completion_rows, preference_rows
from jdpo.data.schemas.turn_marks import MARKS, is_learnt
from jdpo.types import CompletionRow, Message, PreferenceRow

QUESTION = {"role": "user", "content": "Name a river."}
ANSWERS = [{"role": "assistant", "content": words} for words in ("Dublin.", "The Seine.")]


def conversation(raw: dict[str, Any]) -> list[Message]:
    (row,) = completion_rows(raw, "chats.jsonl:1")
    assert isinstance(row, CompletionRow)
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    return [*row.prompt, *row.completion]


def learnt(raw: dict[str, Any]) -> list[bool]:
    return [is_learnt(message) for message in conversation(raw) if message["role"] == "assistant"]


def marked(first: Any, second: Any, mark: str = "weight") -> dict[str, Any]:
    turns = [answer | {mark: value} for answer, value in zip(ANSWERS, (first, second), strict=True)]
    return {"messages": [QUESTION, turns[0], QUESTION, turns[1]]}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, None)])
def test_a_mark_says_whether_a_turn_is_learnt_and_does_not_reach_the_template(mark: str, no: Any, yes: Any) -> None:
    raw = marked(no, yes, mark)
    assert learnt(raw) == [False, True]
    assert conversation(raw) == [QUESTION, ANSWERS[0], QUESTION, ANSWERS[1]]
    assert learnt(marked(yes, no, mark)) == [True, False]


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", [0, 1], float("nan")])
def test_another_weight_is_an_error_that_names_file_and_row(value: Any) -> None:
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: weight of messages\[3\] is"):
        completion_rows(marked(0, value), "chats.jsonl:1")


def test_marks_of_sharegpt_turns_and_of_calls() -> None:
    called = {"from": "function_call", "value": '{"name": "look", "arguments": {}}', "train": False}
    turns = [{"from": "human", "value": "Hi"}, called, {"from": "observation", "value": "18"}]
    assert learnt({"conversations": [*turns, {"from": "gpt", "value": "Warm.", "train": True}]}) == [False, True]


@pytest.mark.parametrize(
    ("mask", "found"),
    [([0, 0, 0, 1], [False, True]), ([1, 1, 1, 0], [True, False]), ([0, 1], [False, True]), ([True, True], [True] * 2)],
)
def test_a_mask_of_all_turns_or_of_the_assistants(mask: list[Any], found: list[bool]) -> None:
    messages = [QUESTION, ANSWERS[0], QUESTION, ANSWERS[1]]
    for column in ("loss_mask", "train"):
        assert learnt({"messages": messages, column: mask}) == found


def test_a_mask_of_another_length_or_of_nothing_is_an_error() -> None:
    messages = [QUESTION, ANSWERS[0], QUESTION, ANSWERS[1]]
    with pytest.raises(ValueError, match="x:7: loss_mask has 3 values"):
        completion_rows({"messages": messages, "loss_mask": [0, 1, 1]}, "x:7")
    with pytest.raises(ValueError, match=r"x:7: loss_mask\[3\] is 2"):
        completion_rows({"messages": messages, "loss_mask": [0, 2]}, "x:7")
    with pytest.raises(ValueError, match="x:7: the row has a loss_mask but no column of messages"):
        completion_rows({"prompt": "Hi", "completion": "Hello", "loss_mask": [0, 1]}, "x:7")


def test_columns_with_other_meanings_are_not_masks() -> None:
    messages = [QUESTION, ANSWERS[1]]
    assert learnt({"messages": messages, "loss": 0.7, "train": "yes", "weight": None}) == [True]
    (row,) = completion_rows({"prompt": "Hi", "completion": "Hello", "train": [1, 2, 3]}, "x:1")
    assert row == CompletionRow("Hi", "Hello", "x:1")


def test_sides_of_a_pair_may_be_marked() -> None:
    raw = {"prompt": [QUESTION], "chosen": [ANSWERS[1]], "rejected": [ANSWERS[0] | {"weight": 0}]}
    (row,) = preference_rows(raw, "x:1")
    assert isinstance(row, PreferenceRow)
    assert [is_learnt(side[0]) for side in (row.chosen, row.rejected) if not isinstance(side, str)] == [True, False]
