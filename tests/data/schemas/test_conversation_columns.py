"""Conversations in a column next to the sides of a pair: which of them are its prompt."""

from __future__ import annotations

from typing import Any

import pytest

from jdpo.data.schemas.formats import (
    NO_SHARED_TURN,
    PROMPT_ELSEWHERE,
    STARTS_WITH_ANSWER,
    Dropped,
    Reading,
    completion_rows,
    preference_rows,
    schema_name,
)
from jdpo.data.schemas.messages import assistant, user
from jdpo.types import CompletionRow, PreferenceRow

COLUMNS = ("messages", "conversation", "conversations", "context", "history")
BRIEF = {"role": "system", "content": "Be brief."}
ASK, MORE = user("Name a river."), user("Name another.")
SEINE, RHINE, DUBLIN = assistant("The Seine."), assistant("The Rhine."), assistant("Dublin.")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "map"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SEEN = {"role": "tool", "content": "Seine"}


def pair(raw: dict[str, Any]) -> PreferenceRow | Dropped:
    (row,) = preference_rows(raw, "x:1")
    return row


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    "conversation",
    [
        [ASK],
        [BRIEF, ASK],
        [ASK, RHINE, MORE],
        [assistant("Hello!"), ASK],
        [{"from": "human", "value": "Name a river."}],
    ],
    ids=["question", "system", "turns", "greeting", "sharegpt"],
)
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The Seine.", "Dublin."),
        (SEINE, DUBLIN),
        ([SEINE], [DUBLIN]),
        ({"from": "gpt", "value": "The Seine."}, "Dublin."),
    ],
)
def test_a_conversation_next_to_the_sides_is_their_prompt(
    column: str, conversation: list[Any], chosen: Any, rejected: Any
) -> None:
    raw = {column: conversation, "chosen": chosen, "rejected": rejected, "id": "a"}
    prompt = [ASK] if "from" in conversation[0] else conversation
    assert pair(raw) == PreferenceRow(prompt, [SEINE], [DUBLIN], "x:1")
    assert completion_rows(raw, "x:1") == [CompletionRow(prompt, [SEINE], "x:1")]
    # It is the prompt, whatever `input` contains.
    assert pair({**raw, "input": "Name a river."}) == PreferenceRow(prompt, [SEINE], [DUBLIN], "x:1")


def test_sides_may_be_calls_and_have_several_turns() -> None:
    raw = {"context": [ASK], "chosen": CALLS, "rejected": "Dublin."}
    assert pair(raw) == PreferenceRow([ASK], [CALLS], [DUBLIN], "x:1")
    long = {"context": [ASK], "chosen": [CALLS, SEEN, SEINE], "rejected": [CALLS, SEEN, DUBLIN]}
    assert pair(long) == PreferenceRow([ASK, CALLS, SEEN], [SEINE], [DUBLIN], "x:1")
    further = {"history": [ASK, RHINE], "chosen": [MORE, SEINE], "rejected": [MORE, DUBLIN]}
    assert pair(further) == PreferenceRow([ASK, RHINE, MORE], [SEINE], [DUBLIN], "x:1")


def test_sides_may_repeat_the_end_of_the_conversation() -> None:
    raw = {"messages": [BRIEF, ASK], "chosen": [ASK, SEINE], "rejected": [ASK, DUBLIN]}
    assert pair(raw) == PreferenceRow([BRIEF, ASK], [SEINE], [DUBLIN], "x:1")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    ("chosen", "rejected"), [("The Seine.", "Dublin."), ([SEINE], [DUBLIN]), ("Dublin.", "The Seine."), (CALLS, SEINE)]
)
def test_a_conversation_that_ends_in_a_side_is_the_prompt_without_it(column: str, chosen: Any, rejected: Any) -> None:
    row = pair({column: [ASK, SEINE], "chosen": chosen, "rejected": rejected})
    assert isinstance(row, PreferenceRow)
    assert row.prompt == [ASK]


CHAT = {"chosen": [ASK, SEINE], "rejected": [ASK, DUBLIN]}


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"messages": [ASK, SEINE]}, id="messages-equal-chosen"),
        pytest.param({"conversation": [ASK, DUBLIN]}, id="it-equals-rejected"),
        pytest.param({"messages": [ASK, assistant("The Seine. ")]}, id="but-for-spaces"),
        pytest.param({"messages": [ASK, RHINE]}, id="the-same-question-with-a-third-answer"),
        pytest.param({"messages": [BRIEF, ASK, RHINE]}, id="the-same-with-a-system-turn"),
        pytest.param({"history": [ASK]}, id="both-sides-begin-with-it"),
        pytest.param({"conversations": [{"from": "human", "value": "Name a river."}]}, id="in-other-words"),
        pytest.param({"conversation": [{"input": "Name a river.", "output": "The Seine."}]}, id="input-and-output"),
        pytest.param({"history": [["Hi", "Hello"]]}, id="couples"),
        pytest.param({"context": "Geography."}, id="a-string"),
        pytest.param({"messages": []}, id="no-messages"),
        pytest.param({"messages": None}, id="null"),
    ],
)
def test_a_column_that_repeats_a_side_or_has_another_shape_is_left_alone(columns: dict[str, Any]) -> None:
    raw = {**CHAT, **columns}
    assert schema_name(raw) == "implicit"
    assert pair(raw) == PreferenceRow([ASK], [SEINE], [DUBLIN], "x:1")


def test_a_conversation_that_a_side_has_after_its_system_turn_is_repeated_too() -> None:
    raw = {"messages": [ASK], "chosen": [BRIEF, ASK, SEINE], "rejected": [BRIEF, ASK, DUBLIN]}
    assert pair(raw) == PreferenceRow([BRIEF, ASK], [SEINE], [DUBLIN], "x:1")


@pytest.mark.parametrize("name", ["prompt", "instruction", "question"])
def test_a_prompt_of_its_own_comes_first(name: str) -> None:
    raw = {name: "Name a river.", "history": [MORE], "chosen": [SEINE], "rejected": [DUBLIN]}
    if name == "instruction":
        raw["history"] = [["Hi", "Hello"]]
    row = pair(raw)
    assert isinstance(row, PreferenceRow)
    assert row.prompt == ([user("Hi"), assistant("Hello"), ASK] if name == "instruction" else [ASK])


@pytest.mark.parametrize("empty", ["", [], None])
def test_an_empty_prompt_is_none(empty: Any) -> None:
    raw = {"prompt": empty, "messages": [ASK], "chosen": "The Seine.", "rejected": "Dublin."}
    assert pair(raw) == PreferenceRow([ASK], [SEINE], [DUBLIN], "x:1")


def test_transcripts_are_whole_conversations() -> None:
    sides = {
        "chosen": "\n\nHuman: Name a river.\n\nAssistant: The Seine.",
        "rejected": "\n\nHuman: Name a river.\n\nAssistant: Dublin.",
    }
    for conversation in ([ASK], [MORE]):
        assert pair({"messages": conversation, **sides}) == PreferenceRow([ASK], [SEINE], [DUBLIN], "x:1")


def test_two_conversations_that_differ_are_an_error_until_one_is_named() -> None:
    raw = {"messages": [ASK], "context": [MORE], "chosen": "The Seine.", "rejected": "Dublin."}
    with pytest.raises(ValueError, match=r"^x:1: messages and context are different conversations"):
        preference_rows(raw, "x:1")
    (row,) = preference_rows(raw, "x:1", Reading({"prompt": "context"}))
    assert isinstance(row, PreferenceRow)
    assert row.prompt == [MORE]
    assert pair({**raw, "context": [ASK]}) == PreferenceRow([ASK], [SEINE], [DUBLIN], "x:1")


def test_sides_of_another_conversation_are_dropped() -> None:
    raw = {"messages": [ASK], "chosen": [MORE, SEINE], "rejected": [MORE, DUBLIN]}
    row = pair(raw)
    assert isinstance(row, Dropped)
    assert row.reason == PROMPT_ELSEWHERE


def test_a_conversation_with_a_broken_message_is_named() -> None:
    raw = {"messages": [ASK, {"role": "narrator", "content": "Hm."}], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"^x:1: messages\[1\] has the role 'narrator'"):
        preference_rows(raw, "x:1")


def test_supervised_rows_learn_the_conversation_where_it_ends_in_an_answer() -> None:
    raw = {"messages": [ASK, RHINE], "chosen": "The Seine.", "rejected": "Dublin."}
    assert completion_rows(raw, "x:1") == [CompletionRow([ASK], [RHINE], "x:1")]


def test_supervised_rows_learn_the_chosen_side_where_the_conversation_has_no_answer() -> None:
    for raw in ({**CHAT, "messages": [ASK]}, {"messages": [ASK], "chosen": "The Seine.", "rejected": "Dublin."}):
        assert completion_rows(raw, "x:1") == [CompletionRow([ASK], [SEINE], "x:1")]


def test_pairs_that_share_no_turn_are_dropped_with_advice() -> None:
    row = pair({"chosen": [SEINE], "rejected": [DUBLIN], "topic": "rivers"})
    assert isinstance(row, Dropped)
    assert row.reason == NO_SHARED_TURN
    assert "column_map" in row.detail
    assert "topic" in row.detail


@pytest.mark.parametrize("system", [{}, {"system": "Be brief."}])
def test_a_pair_that_starts_with_the_assistant_for_want_of_a_prompt_is_marked(system: dict[str, str]) -> None:
    sides = {"chosen": [RHINE, MORE, SEINE], "rejected": [RHINE, MORE, DUBLIN]}
    row = pair({**sides, **system})
    assert isinstance(row, PreferenceRow)
    assert row.notes == (STARTS_WITH_ANSWER,)
    with_prompt = pair({**sides, **system, "messages": [ASK]})
    assert isinstance(with_prompt, PreferenceRow)
    assert with_prompt.notes == ()
    empty = pair({**sides, **system, "prompt": []})
    assert isinstance(empty, PreferenceRow)
    assert empty.notes == (STARTS_WITH_ANSWER,)
    votes = {"conversation_a": sides["chosen"], "conversation_b": sides["rejected"], "winner": "a"}
    voted = pair({**votes, **system})
    assert isinstance(voted, PreferenceRow)
    assert voted.notes == (STARTS_WITH_ANSWER,)
    # In a conversation named as the prompt, a greeting is part of it.
    greeted = pair({"prompt": [RHINE, MORE], "chosen": [SEINE], "rejected": [DUBLIN]})
    assert isinstance(greeted, PreferenceRow)
    assert greeted.notes == ()
