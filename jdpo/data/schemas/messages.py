"""Conversations in all forms that files use, read into the one form that chat templates take.

Roles get the names that templates know, contents become text, and function calls become `tool_calls`. Marks of turns
that are not learnt are removed (see `jdpo.data.schemas.turn_marks`). Other keys of a message stay as they are. A turn
that has calls and no text has `"content": None`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jdpo.data.schemas.describing import kind, named, shown
from jdpo.data.schemas.objects_of_lists import as_list
from jdpo.data.schemas.tool_calls import are_calls, read_call_text, read_calls
from jdpo.data.schemas.turn_marks import take_marks
from jdpo.types import Message, Text

FUNCTION_CALL = "function_call"

ROLES = {
    "system": "system",
    # OpenAI's newer name of the role, which few templates know.
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    FUNCTION_CALL: "assistant",
    "tool": "tool",
    "function": "tool",
    # LLaMA-Factory's name
    "observation": "tool",
    # Llama 3's name
    "ipython": "tool",
}
"""Role in files -> role in chat templates."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_STARTS_A_TRANSCRIPT = re.compile(r"\s*Human:")
# Single quotes too: Python's repr of a list is refused with advice instead of being learnt as text.
_WRITTEN_OUT = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:")
_NOT_JSON = "a conversation written as text that is not JSON; expected a list of {role, content}, or its JSON text"

Raw = Mapping[str, Any]


def read_messages(value: Any, place: str, origin: str) -> list[Message]:
    """Reads {role, content} or {from, value} messages.

    Args:
      value: a list of messages, or a single message.
      place: the column, for error messages.
      origin: where the row came from, for error messages.

    Raises:
      ValueError: an element is not a message, a role is unknown, or a content is not text.
    """
    if not isinstance(value, list | dict):
        raise ValueError(f"{origin}: {place} is {kind(value)}; expected a list of {{role, content}} messages")
    # `datasets.Sequence` stores a list of objects as an object of lists.
    value = as_list(value, place, origin)
    messages = [value] if isinstance(value, dict) else value
    found = []
    for index, message in enumerate(messages):
        at = f"{place}[{index}]"
        found.append(take_marks(_message(message, at, origin), message, at, origin))
    return found


def read_side(value: Any, place: str, origin: str) -> list[Message]:
    """Reads a side: a list of messages, a single message, or the assistant's text or calls alone."""
    if isinstance(value, str):
        return [assistant(value)]
    # A side may be the calls alone, without a message around them.
    if are_calls(value):
        value = {"role": "assistant", "tool_calls": value if isinstance(value, list) else [value]}
    elif isinstance(value, dict) and "tool_calls" in value and value.keys().isdisjoint(("role", "from")):
        value = {"role": "assistant", **value}
    return read_messages(value, place, origin)


def user(words: str) -> Message:
    """Returns a user turn."""
    return {"role": "user", "content": words}


def assistant(words: str) -> Message:
    """Returns an assistant turn."""
    return {"role": "assistant", "content": words}


def as_messages(prompt: Text) -> list[Message]:
    """Returns a prompt as messages; plain text becomes a user turn."""
    if isinstance(prompt, str):
        return [user(prompt)] if prompt else []
    return prompt


def is_transcript(value: Any) -> bool:
    r"""Returns whether a value is text that starts like '\n\nHuman: ...'."""
    return isinstance(value, str) and _STARTS_A_TRANSCRIPT.match(value) is not None


def read_transcript(text: str) -> list[Message]:
    r"""Splits an HH-RLHF transcript into messages.

    >>> read_transcript("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    # Split at the headers, which stay as separate parts because the pattern has a group.
    _, *parts = _TURN.split(text.strip())
    return [
        (user if speaker == "Human" else assistant)(words.strip())
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_history(value: Any, origin: str) -> list[Message]:
    """Reads earlier turns from [question, answer] pairs, as alpaca files have them."""
    couples = value if isinstance(value, list) else [value]
    messages = []
    for index, couple in enumerate(couples):
        if not isinstance(couple, list) or len(couple) != 2 or not all(isinstance(words, str) for words in couple):
            raise ValueError(f"{origin}: history[{index}] is {kind(couple)}; expected [question, answer], two strings")
        messages += [user(couple[0]), assistant(couple[1])]
    return messages


def has_role(value: Any, role: str) -> bool:
    """Returns whether a message of a conversation, or of a list of ranked answers, has a role, named as in files.

    >>> has_role([{"role": "Developer", "content": "Be brief."}], "developer"), has_role("developer", "developer")
    (True, False)
    """
    items = value if isinstance(value, list) else [value]
    return any(
        str(item.get("role", item.get("from"))).lower() == role or has_role(item.get("completion"), role)
        for item in items
        if isinstance(item, dict)
    )


def joined(prompt: Text, side: list[Message]) -> list[Message] | None:
    """Joins a prompt and a side, which may repeat the prompt, to one conversation; None if they contradict each other.

    >>> joined("Hi", [assistant("Hello")]) == joined("Hi", [user("Hi"), assistant("Hello")])
    True
    """
    # The side contains no question, so it does not repeat the prompt.
    if not prompt or side[0]["role"] in ("assistant", "tool"):
        return as_messages(prompt) + side
    if isinstance(prompt, str):
        asked = [message["content"].strip() for message in side if message["role"] == "user"]
        return side if prompt.strip() in asked else None
    # The side repeats the prompt from its start, or only the prompt's last messages.
    history = side[:-1]
    if history[: len(prompt)] == prompt:
        return side
    return [*prompt, side[-1]] if history and prompt[-len(history) :] == history else None


def is_written_out(value: Any) -> bool:
    """Returns whether a value is text that looks like a list of messages, as in a cell of a CSV file."""
    return isinstance(value, str) and _WRITTEN_OUT.match(value) is not None


def from_text(value: str, place: str, origin: str) -> Any:
    """Parses the conversation in a cell that `is_written_out`.

    Raises:
      ValueError: it is not JSON, such as Python's repr of a list.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{origin}: {place} is {_NOT_JSON}; found {shown(value)}") from None


def _message(message: Any, place: str, origin: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{origin}: {place} is {kind(message)}; expected a message {{role, content}}")
    # ShareGPT's keys. A message may have a `from` next to its role, for example a name.
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    if role_key not in message:
        raise _not_a_message(message, place, origin)
    role, content = message[role_key], message.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{origin}: {place} has the role {shown(role)}; known roles are {', '.join(ROLES)}")
    # ShareGPT writes a call as a turn of its own, with JSON text as its content.
    if role.lower() == FUNCTION_CALL:
        calls = read_call_text(content, f"{place}.{content_key}", origin)
        return {"role": "assistant", "content": None, "tool_calls": calls}
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    # `function_call` is the older form of `tool_calls`, with a single call.
    called = rest.pop(FUNCTION_CALL, None)
    calls = read_calls(rest.pop("tool_calls", None), called, f"{place}.tool_calls", origin)
    if calls:
        rest["tool_calls"] = calls
    speaker = ROLES[role.lower()]
    # A turn that only calls functions. Other roles need a content.
    if content is None and calls and speaker == "assistant":
        return {"role": speaker, "content": None, **rest}
    if content_key not in message:
        raise _not_a_message(message, place, origin)
    return {"role": speaker, "content": content_text(content, f"the {content_key} of {place}", origin), **rest}


def _not_a_message(message: dict[str, Any], place: str, origin: str) -> ValueError:
    return ValueError(
        f"{origin}: {place} has the keys {named(message)}; expected a message {{role, content}} or {{from, value}}"
    )


def content_text(content: Any, place: str, origin: str) -> str:
    """Returns a content as text, with {type: text, text} parts joined.

    Raises:
      ValueError: the content, or a part of it such as an image, is not text.
    """
    if isinstance(content, str):
        return content
    content = as_list(content, place, origin)
    if not isinstance(content, list):
        raise ValueError(f"{origin}: {place} is {kind(content)}; expected a string")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"of type {shown(part['type'])}" if isinstance(part, dict) and "type" in part else shown(part)
            raise ValueError(
                f"{origin}: {place} is a list with a part {what}; jdpo reads text only: a string, or parts "
                "{type: text, text}"
            )
        texts.append(part["text"])
    return "".join(texts)
