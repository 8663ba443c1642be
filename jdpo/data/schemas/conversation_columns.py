"""Pairs whose prompt is a conversation in another column than `prompt`.

Such a column is the prompt if the row has no other prompt and no side repeats the column. Files also use `messages` for
the chosen conversation, or for the messages that both sides start with.
"""

from __future__ import annotations

from typing import Any

from jdpo.data.schemas import messages
from jdpo.data.schemas.comparing import comparable
from jdpo.data.schemas.messages import Raw, read_messages, read_side
from jdpo.data.schemas.ranked import Answer, Asked, Dropped
from jdpo.data.schemas.row_building import PROMPT_ELSEWHERE, ends_with_other_role
from jdpo.data.schemas.schema_readers import two_sides
from jdpo.types import Message

COLUMNS = ("messages", "conversation", "conversations", "context", "history")
"""Columns that may contain the conversation that both sides answer."""

_NAMED_PROMPTS = ("prompt", "instruction", "question")
_SIDES = ("chosen", "rejected")


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a list of messages, judging by its first element.

    >>> is_conversation([{"role": "user", "content": "Hi"}]), is_conversation([["Hi", "Hello"]]), is_conversation([])
    (True, False, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not value[0].keys().isdisjoint(("role", "from"))
    )


def prompt_columns(raw: Raw) -> list[str]:
    """Returns the columns of a pair that may be the prompt of both sides.

    Args:
      raw: the row's columns without nulls.
    """
    # An explicit prompt wins; `messages` is then only a copy or metadata.
    if any(raw.get(name) for name in _NAMED_PROMPTS):
        return []
    sides = [raw.get(name) for name in _SIDES]
    # Transcripts contain their prompt.
    if not all(isinstance(side, str | list | dict) and not messages.is_transcript(side) for side in sides):
        return []
    found = [name for name in COLUMNS if is_conversation(raw.get(name))]
    # Comparing needs parsing, so it is done only for columns that look like conversations.
    return [name for name in found if not any(_repeats(side, raw[name]) for side in sides)]


def ends_in_answer(value: Any) -> bool:
    """Returns whether the last message of a list is the assistant's."""
    last = value[-1] if is_conversation(value) else None
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return messages.ROLES.get(str(role).lower()) == "assistant"


def conversation_pair(raw: Raw, origin: str) -> Asked | Dropped:
    """Reads a pair whose prompt is one of `COLUMNS`.

    A side may be the answer alone, have further turns after it, or repeat the end of the conversation.

    Raises:
      ValueError: two columns with different conversations may be the prompt, or a message cannot be read.
    """
    # In ShareGPT rows `conversations` is the prompt, also if `prompt_columns` finds none.
    names = prompt_columns(raw) or ["conversations"]
    conversation, *others = [read_messages(raw[name], name, origin) for name in names]
    # Several columns with the same conversation are common: files keep it in more than one format.
    if any(comparable(other) != comparable(conversation) for other in others):
        raise ValueError(
            f"{origin}: {' and '.join(names)} are different conversations that both sides may answer; name the prompt "
            f"with column_map: {{prompt: {names[0]}}}"
        )
    answers = two_sides(raw, origin)
    dropped = ends_with_other_role(answers, origin)
    if dropped is not None:
        return dropped
    conversation = _without_answer(conversation, [_messages(answer) for answer in answers])
    whole = []
    for answer in answers:
        turns = _continued(conversation, _messages(answer))
        if turns is None:
            return Dropped(PROMPT_ELSEWHERE, origin, f"{names[0]} and the sides")
        whole.append(answer._replace(text=turns))
    return Asked([], whole)


def _messages(answer: Answer) -> list[Message]:
    assert not isinstance(answer.text, str)
    return answer.text


def _repeats(side: Any, value: list[Any]) -> bool:
    """Returns whether a side is a whole conversation to which the column adds nothing.

    This is so if the side starts with the column, and if both start with the same question: then the column is the
    conversation with another answer. A system turn that only the column has is an addition.
    """
    try:
        turns, given = (_stripped(read_side(one, "", "")) for one in (side, value))
    except ValueError:  # reading the row raises it again, with the row's name
        return False
    body, given_body = (_without_system(one) for one in (turns, given))
    # The side starts with the column, with or without its own system turn.
    if given in (turns[: len(given)], body[: len(given)]):
        return True
    # Only the column has a system turn, and otherwise the side starts with it: the system turn would be lost.
    if len(given_body) < len(given) and len(body) == len(turns) and body[: len(given_body)] == given_body:
        return False
    return bool(body) and body[:1] == given_body[:1]


def _stripped(turns: list[Message]) -> list[Message]:
    """Returns turns for comparing, without whitespace around their content."""
    return [
        {**turn, "content": turn["content"].strip()} if isinstance(turn.get("content"), str) else turn
        for turn in comparable(turns)
    ]


def _without_system(turns: list[Message]) -> list[Message]:
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def _without_answer(conversation: list[Message], sides: list[list[Message]]) -> list[Message]:
    """Removes messages at the end of the conversation that repeat a side, since they are not part of the prompt."""
    for side in sides:
        # Shorter than the conversation, because something must be left to answer.
        if side and len(side) < len(conversation) and _stripped(conversation[-len(side) :]) == _stripped(side):
            return conversation[: -len(side)]
    return conversation


def _continued(conversation: list[Message], side: list[Message]) -> list[Message] | None:
    """Returns the conversation followed by a side, or None if the side does not continue it."""
    if not side:
        return side
    whole = messages.joined(conversation, side)
    # The conversation ends with an answer, so the side starts with the next question.
    if whole is None and conversation[-1]["role"] != "user" and side[0]["role"] == "user":
        return conversation + side
    return whole
