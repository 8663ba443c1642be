"""Marks in files that tell which turns of a conversation are learnt.

A mark is a key of a message (`weight` in OpenAI's and Mistral's files, `train` and `loss` in others), or a list in a
column of the row with a value for each turn:

    {"messages": [..., {"role": "assistant", "content": "Dublin.", "weight": 0}]}
    {"messages": [question, answer, question, answer], "loss_mask": [0, 0, 0, 1]}     one value per message
    {"messages": [question, answer, question, answer], "loss_mask": [0, 1]}           one value per assistant turn

0 and false mean "shown, not learnt"; 1, true and a missing mark mean "learnt". Turns of other roles than the assistant
are never learnt. Marks are removed from messages, so that no chat template sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdpo.types import Message

MARKS = ("weight", "train", "loss", "loss_mask")
"""Names of marks: keys of a message, or columns with a list."""

_CONVERSATIONS = ("messages", "conversations", "conversation")


class ShownMessage(dict[str, Any]):
    """A message that is shown and not learnt. It equals a plain message with the same keys."""


def is_learnt(message: Message) -> bool:
    """Returns whether an assistant turn is learnt."""
    return not isinstance(message, ShownMessage)


def take_marks(message: Message, raw: Mapping[str, Any], place: str, origin: str) -> Message:
    """Returns the message without its marks, as a `ShownMessage` if one of them is 0.

    Args:
      message: the message in the form that templates take.
      raw: the message in the file.
      place, origin: its place, for error messages.

    Raises:
      ValueError: a mark is neither 0 nor 1.

    >>> take_marks({"role": "assistant", "content": "Hi"}, {"weight": 1}, "messages[1]", "a.jsonl:1")
    {'role': 'assistant', 'content': 'Hi'}
    """
    marks = [_value(raw[key], f"{key} of {place}", origin) for key in MARKS if raw.get(key) is not None]
    rest = {key: value for key, value in message.items() if key not in MARKS}
    # A subclass instead of a key: chat templates must not see the mark, and comparisons must not depend on it.
    return rest if all(marks) else ShownMessage(rest)


def spread_mask(columns: Mapping[str, Any], speakers: Mapping[str, str], origin: str) -> Mapping[str, Any]:
    """Returns the columns of a row with a mask over all turns written into the messages.

    Args:
      columns: the columns of the row.
      speakers: {role in files: role in chat templates}.
      origin: where the row came from, for error messages.

    Raises:
      ValueError: the mask has another length than the conversation, or there is no conversation for it.
    """
    # Columns with these names and other types, such as a sampling weight per row, are not marks.
    names = [name for name in MARKS if isinstance(columns.get(name), list)]
    if not names:
        return columns
    name, mask = names[0], columns[names[0]]
    conversations = [column for column in _CONVERSATIONS if _is_conversation(columns.get(column))]
    if not conversations:
        if name == "loss_mask":
            raise ValueError(
                f"{origin}: the row has a loss_mask but no column of messages; expected `messages` next to it, with "
                "one value of loss_mask per message or per assistant turn. Rename loss_mask if it means something else"
            )
        return columns
    column = conversations[0]
    messages = columns[column]
    roles = [str(message.get("role", message.get("from"))).lower() for message in messages]
    answers = [place for place, role in enumerate(roles) if speakers.get(role) == "assistant"]
    if len(mask) not in (len(messages), len(answers)):
        raise ValueError(
            f"{origin}: {name} has {len(mask)} values; expected one per message of {column} ({len(messages)}) or one "
            f"per assistant turn ({len(answers)})"
        )
    # If a conversation has only assistant turns, both lengths are equal, and so are both meanings.
    places = range(len(messages)) if len(mask) == len(messages) else answers
    marked = list(messages)
    for place, value in zip(places, mask, strict=True):
        marked[place] = {**messages[place], name: _value(value, f"{name}[{place}]", origin)}
    return {**columns, column: marked}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _value(value: Any, place: str, origin: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(
        f"{origin}: {place} is {value!r:.60}; expected 1 or true for a turn that is learnt, 0 or false for one that is "
        "shown only (other weights are not supported)"
    )
