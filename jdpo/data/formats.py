"""Every known schema of preference and supervised rows, read into one form.

A row's schema is found by its columns and the types of their values: the first match in `PREFERENCE_SCHEMAS` or
`COMPLETION_SCHEMAS`. Columns that are null count as absent; columns that no schema names are ignored.

Conversations are cut by message, never by character: the prompt is every message before the final assistant turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jdpo.types import CompletionRow, Message, PreferenceRow, Text

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""What roles are called in files, and in chat templates."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_STARTS_A_TRANSCRIPT = re.compile(r"\s*Human:")

Raw = Mapping[str, Any]


class Dropped(NamedTuple):
    """A row that is not trained on, and why, in words that are counted."""

    reason: str
    origin: str
    detail: str = ""


EMPTY_SIDE = "empty side"
HISTORIES_DIFFER = "histories differ"
NO_ASSISTANT_TURN = "no assistant turn at the end"
PROMPT_ELSEWHERE = "prompt is not that of the conversation"
NO_TEXT = "a turn without text (tool calls alone)"


class _NoText(Exception):
    """A turn of the row has no words of its own."""


class Schema(NamedTuple):
    """One way of writing rows: what it is, how to know it, how to read it."""

    description: str
    matches: Callable[[Raw], bool]
    build: Callable[[Raw, str], Any]


def preference_row(raw: Raw, origin: str) -> PreferenceRow | Dropped:
    """Reads a raw row of any known preference schema.

    Args:
      raw: column name to value.
      origin: where the row came from, for messages.

    Returns:
      The row, its three parts all strings or all message lists, or Dropped where the two sides share no prompt or
      a turn is tool calls alone.

    Raises:
      ValueError: no schema fits the columns, a side is null, a role is unknown, a content is not a string.
    """
    columns = _present(raw)
    schema = _detect(columns, PREFERENCE_SCHEMAS, raw, origin)
    try:
        row: PreferenceRow | Dropped = schema.build(columns, origin)
    except _NoText:
        return Dropped(NO_TEXT, origin)
    return row


def completion_row(raw: Raw, origin: str) -> CompletionRow | Dropped:
    """Reads a raw row of any known supervised schema; of a preference row the chosen side is learnt.

    Returns:
      The row, both parts strings or message lists, or Dropped where no assistant turn ends it.

    Raises:
      ValueError: as in `preference_row`.
    """
    columns = _present(raw)
    schema = _detect(columns, COMPLETION_SCHEMAS, raw, origin)
    try:
        row: CompletionRow | Dropped = schema.build(columns, origin)
    except _NoText:
        return Dropped(NO_TEXT, origin)
    return row


def is_preference(raw: Raw) -> bool:
    """Whether `completion_row` takes the chosen side of a preference row."""
    columns = _present(raw)
    schema = next((schema for schema in COMPLETION_SCHEMAS if schema.matches(columns)), None)
    return schema is not None and schema.build is _chosen_side


def _present(raw: Raw) -> Raw:
    return {name: value for name, value in raw.items() if value is not None}


def _detect(columns: Raw, schemas: Sequence[Schema], raw: Raw, origin: str) -> Schema:
    for schema in schemas:
        if schema.matches(columns):
            return schema
    found = ", ".join(f"{name} ({_kind(value)})" for name, value in raw.items()) or "none"
    known = "".join(f"\n  {schema.description}" for schema in schemas)
    raise ValueError(f"{origin}: the columns fit no known format.\nFound: {found}\nKnown formats:{known}")


def _sharegpt_pair(raw: Raw, origin: str) -> PreferenceRow | Dropped:
    history = _messages(raw["conversations"], "conversations", origin)
    return _preference(history, _side(raw, "chosen", origin), _side(raw, "rejected", origin), origin)


def _explicit_pair(raw: Raw, origin: str) -> PreferenceRow | Dropped:
    prompt, chosen, rejected = raw["prompt"], raw["chosen"], raw["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return PreferenceRow(prompt, chosen, rejected, origin)
    history: Text = prompt if isinstance(prompt, str) else _messages(prompt, "prompt", origin)
    return _preference(history, _side(raw, "chosen", origin), _side(raw, "rejected", origin), origin)


def _whole_conversations(raw: Raw, origin: str) -> PreferenceRow | Dropped:
    return _preference([], _side(raw, "chosen", origin), _side(raw, "rejected", origin), origin)


def _transcripts(raw: Raw, origin: str) -> PreferenceRow | Dropped:
    return _preference([], _turns(raw["chosen"]), _turns(raw["rejected"]), origin)


def _conversation(raw: Raw, origin: str) -> CompletionRow | Dropped:
    column = "messages" if "messages" in raw else "conversations"
    return _completion(_messages(raw[column], column, origin), origin)


def _explicit_completion(raw: Raw, origin: str) -> CompletionRow | Dropped:
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionRow(prompt, completion, origin)
    history: Text = prompt if isinstance(prompt, str) else _messages(prompt, "prompt", origin)
    side = _side(raw, "completion", origin)
    return _completion(_joined(history, side), origin) if side else Dropped(EMPTY_SIDE, origin)


def _chosen_side(raw: Raw, origin: str) -> CompletionRow | Dropped:
    # The rejected side is not learnt, so it may not cost the row either: the chosen side stands in for it.
    row = preference_row({**raw, "rejected": raw["chosen"]}, origin)
    return row if isinstance(row, Dropped) else CompletionRow(row.prompt, row.chosen, origin)


def _has(raw: Raw, **types: type | tuple[type, ...]) -> bool:
    return all(isinstance(raw.get(name), kind) for name, kind in types.items())


_MESSAGES = (list, dict)
_SIDE = (str, list, dict)

PREFERENCE_SCHEMAS = (
    Schema(
        "conversations: [{from, value}, ...], chosen and rejected: {from, value}",
        lambda raw: _has(raw, conversations=list, chosen=_SIDE, rejected=_SIDE),
        _sharegpt_pair,
    ),
    Schema(
        "prompt, chosen and rejected: strings, or lists of {role, content}; the sides may be whole conversations",
        lambda raw: _has(raw, prompt=_SIDE, chosen=_SIDE, rejected=_SIDE),
        _explicit_pair,
    ),
    Schema(
        "chosen and rejected without prompt: whole conversations, lists of {role, content}",
        lambda raw: "prompt" not in raw and _has(raw, chosen=list, rejected=list),
        _whole_conversations,
    ),
    Schema(
        r"chosen and rejected without prompt: transcripts like '\n\nHuman: ...\n\nAssistant: ...'",
        lambda raw: (
            "prompt" not in raw
            and _has(raw, chosen=str, rejected=str)
            and all(_STARTS_A_TRANSCRIPT.match(raw[side]) for side in ("chosen", "rejected"))
        ),
        _transcripts,
    ),
)
"""Schemas of preference rows, in the order in which they are tried."""

COMPLETION_SCHEMAS = (
    Schema(
        "messages: a conversation, a list of {role, content} that ends in an assistant turn",
        lambda raw: _has(raw, messages=list),
        _conversation,
    ),
    Schema(
        "conversations: the same as [{from, value}, ...]",
        lambda raw: _has(raw, conversations=list) and "chosen" not in raw and "rejected" not in raw,
        _conversation,
    ),
    Schema(
        "prompt and completion: strings, or lists of {role, content}",
        lambda raw: _has(raw, prompt=_SIDE, completion=_SIDE),
        _explicit_completion,
    ),
    *(
        Schema(f"{schema.description} (the chosen side is learnt)", schema.matches, _chosen_side)
        for schema in PREFERENCE_SCHEMAS
    ),
)
"""Schemas of supervised rows, in the order in which they are tried."""


def _preference(prompt: Text, chosen: list[Message], rejected: list[Message], origin: str) -> PreferenceRow | Dropped:
    """Splits both sides before their final assistant turn; what stands before must be equal."""
    if not chosen or not rejected:
        return Dropped(EMPTY_SIDE, origin)
    rows = [_completion(_joined(prompt, side), origin) for side in (chosen, rejected)]
    for row in rows:
        if isinstance(row, Dropped):
            return row
    first, second = rows
    assert isinstance(first, CompletionRow)
    assert isinstance(second, CompletionRow)
    if first.prompt != second.prompt:
        return Dropped(HISTORIES_DIFFER, origin)
    return PreferenceRow(first.prompt, first.completion, second.completion, origin)


def _completion(conversation: list[Message] | None, origin: str) -> CompletionRow | Dropped:
    if conversation is None:
        return Dropped(PROMPT_ELSEWHERE, origin)
    if not conversation or conversation[-1]["role"] != "assistant":
        return Dropped(NO_ASSISTANT_TURN, origin)
    return CompletionRow(conversation[:-1], conversation[-1:], origin)


def _joined(prompt: Text, side: list[Message]) -> list[Message] | None:
    """The whole conversation of a prompt and a side, which may repeat the prompt; None where they contradict.

    >>> user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    >>> _joined("Hi", [answer]) == _joined("Hi", [user, answer]) == _joined([user], [answer]) == [user, answer]
    True
    """
    if not prompt or side[0]["role"] in ("assistant", "tool"):
        return _as_messages(prompt) + side
    if isinstance(prompt, str):
        asked = [message["content"].strip() for message in side if message["role"] == "user"]
        return side if prompt.strip() in asked else None
    history = side[:-1]
    if history[: len(prompt)] == prompt:
        return side
    return [*prompt, side[-1]] if history and prompt[-len(history) :] == history else None


def _as_messages(prompt: Text) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return prompt


def _side(raw: Raw, column: str, origin: str) -> list[Message]:
    """A side as messages: a list of them, a single one, or the assistant's words alone."""
    value = raw[column]
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else _messages(value, column, origin)


def _turns(transcript: str) -> list[Message]:
    r"""Cuts an HH-RLHF transcript into messages.

    >>> _turns("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    _, *parts = _TURN.split(transcript.strip())
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: Any, column: str, origin: str) -> list[Message]:
    """Reads {role, content} or {from, value} messages; further keys that are not null stay, for the template."""
    if not isinstance(value, _MESSAGES):
        raise ValueError(f"{origin}: {column} is {_kind(value)}; expected a list of {{role, content}} messages")
    messages = [value] if isinstance(value, dict) else value
    return [_message(message, f"{column}[{index}]", origin) for index, message in enumerate(messages)]


def _message(message: Any, place: str, origin: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{origin}: {place} is {_kind(message)}; expected a message {{role, content}}")
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    if message.get("tool_calls") and message.get(content_key) is None and role_key in message:
        raise _NoText
    if role_key not in message or content_key not in message:
        raise ValueError(
            f"{origin}: {place} has the keys {', '.join(message) or 'none'}; expected a message {{role, content}} "
            "or {from, value}"
        )
    role, content = message[role_key], message[content_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{origin}: {place} has the role {role!r}; known roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{origin}: the {content_key} of {place} is {_kind(content)}; expected a string")
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    return {"role": ROLES[role.lower()], "content": content, **rest}


def _kind(value: Any) -> str:
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
