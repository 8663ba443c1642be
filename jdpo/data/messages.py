"""Conversations as files write them, read into the one form that chat templates take.

Roles get the names that templates know, contents become text, calls of functions become `tool_calls`; further keys
of a message stay as they are. A turn whose words are absent beside its calls has `"content": None`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jdpo.safe_text import terminal
from jdpo.types import Message, Text

FUNCTION_CALL = "function_call"

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    FUNCTION_CALL: "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What roles are called in files, and in chat templates."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_STARTS_A_TRANSCRIPT = re.compile(r"\s*Human:")
_WRITTEN_OUT = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:")
_PUT_OFF = "a conversation written as text that is not JSON; expected a list of {role, content}, or its JSON text"

LONGEST_NAME = 60
MOST_NAMED = 40
"""Names of columns or keys in a message at most, and the characters of each."""

Raw = Mapping[str, Any]


def read_messages(value: Any, place: str, origin: str) -> list[Message]:
    """Reads {role, content} or {from, value} messages.

    Args:
      value: a list of messages, or a single one.
      place: the column, for messages.
      origin: where the row came from, for messages.

    Raises:
      ValueError: a message is not one, a role is unknown, a content is not text.
    """
    if not isinstance(value, list | dict):
        raise ValueError(f"{origin}: {place} is {kind(value)}; expected a list of {{role, content}} messages")
    messages = [value] if isinstance(value, dict) else value
    return [_message(message, f"{place}[{index}]", origin) for index, message in enumerate(messages)]


def read_side(value: Any, place: str, origin: str) -> list[Message]:
    """A side as messages: a list of them, a single one, or the assistant's words alone."""
    return [assistant(value)] if isinstance(value, str) else read_messages(value, place, origin)


def user(words: str) -> Message:
    return {"role": "user", "content": words}


def assistant(words: str) -> Message:
    return {"role": "assistant", "content": words}


def as_messages(prompt: Text) -> list[Message]:
    """A prompt as messages; words are the user's."""
    if isinstance(prompt, str):
        return [user(prompt)] if prompt else []
    return prompt


def is_transcript(value: Any) -> bool:
    r"""Whether it is text that begins like '\n\nHuman: ...'."""
    return isinstance(value, str) and _STARTS_A_TRANSCRIPT.match(value) is not None


def read_transcript(text: str) -> list[Message]:
    r"""Cuts an HH-RLHF transcript into messages.

    >>> read_transcript("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    _, *parts = _TURN.split(text.strip())
    return [
        (user if speaker == "Human" else assistant)(words.strip())
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_history(value: Any, place: str, origin: str) -> list[Message]:
    """Reads earlier turns as [question, answer] couples, as alpaca files have them."""
    couples = value if isinstance(value, list) else [value]
    messages = []
    for index, couple in enumerate(couples):
        if not isinstance(couple, list) or len(couple) != 2 or not all(isinstance(words, str) for words in couple):
            raise ValueError(f"{origin}: {place}[{index}] is {kind(couple)}; expected [question, answer], two strings")
        messages += [user(couple[0]), assistant(couple[1])]
    return messages


def joined(prompt: Text, side: list[Message]) -> list[Message] | None:
    """The whole conversation of a prompt and a side, which may repeat the prompt; None where they contradict.

    >>> joined("Hi", [assistant("Hello")]) == joined("Hi", [user("Hi"), assistant("Hello")])
    True
    """
    if not prompt or side[0]["role"] in ("assistant", "tool"):
        return as_messages(prompt) + side
    if isinstance(prompt, str):
        asked = [message["content"].strip() for message in side if message["role"] == "user"]
        return side if prompt.strip() in asked else None
    history = side[:-1]
    if history[: len(prompt)] == prompt:
        return side
    return [*prompt, side[-1]] if history and prompt[-len(history) :] == history else None


def is_written_out(value: Any) -> bool:
    """Whether it is text that looks like a conversation, as a CSV cell has to hold it."""
    return isinstance(value, str) and _WRITTEN_OUT.match(value) is not None


def from_text(value: str, place: str, origin: str) -> Any:
    """The conversation in a cell that `is_written_out`.

    Raises:
      ValueError: it is not JSON (Python's own way of writing lists is not).
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{origin}: {place} holds {_PUT_OFF}; found {shown(value)}") from None


def read_tools(value: Any, place: str, origin: str) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of objects, or JSON text of one; None where there are none.

    Raises:
      ValueError: it is neither.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return [_with_keys(tool) for tool in _objects(value, place, origin) if not _is_void(tool)] or None


def kind(value: Any) -> str:
    """The type of a value in the words of a message."""
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any, width: int = 60) -> str:
    """A value in one short line of printable characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = width
    short.maxlist, short.maxdict, short.maxlevel = 3, 6, 3
    text = short.repr(value)
    return text if len(text) <= 2 * width else f"{text[: 2 * width]}..."


def named(columns: Mapping[str, object] | Sequence[str]) -> str:
    """Column names in a row, printable."""
    return listed([printable(name) for name in map(str, columns)])


def listed(names: Sequence[str]) -> str:
    """Names in a row, the first of many."""
    rest = len(names) - MOST_NAMED
    return (", ".join(names[:MOST_NAMED]) or "none") + (f" and {rest} more" if rest > 0 else "")


def printable(name: str) -> str:
    """A name from a file, printable and not long."""
    text = terminal(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def _message(message: Any, place: str, origin: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{origin}: {place} is {kind(message)}; expected a message {{role, content}}")
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    if role_key not in message:
        raise _not_a_message(message, place, origin)
    role, content = message[role_key], message.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{origin}: {place} has the role {shown(role)}; known roles are {', '.join(ROLES)}")
    if role.lower() == FUNCTION_CALL:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, f"{place}.{content_key}", origin)}
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    called = rest.pop(FUNCTION_CALL, None)
    calls = rest.pop("tool_calls", None) or ([called] if called and not _is_void(called) else None)
    if calls:
        calls = [_call(call) for call in _objects(calls, f"{place}.tool_calls", origin) if not _is_void(call)]
        rest |= {"tool_calls": calls} if calls else {}
    speaker = ROLES[role.lower()]
    if content is None and calls and speaker == "assistant":
        return {"role": speaker, "content": None, **rest}
    if content_key not in message:
        raise _not_a_message(message, place, origin)
    return {"role": speaker, "content": _content(content, f"the {content_key} of {place}", origin), **rest}


def _not_a_message(message: dict[str, Any], place: str, origin: str) -> ValueError:
    return ValueError(
        f"{origin}: {place} has the keys {named(message)}; expected a message {{role, content}} or {{from, value}}"
    )


def _content(content: Any, place: str, origin: str) -> str:
    """Text, or the text of {type: text, text} parts joined."""
    if isinstance(content, str):
        return content
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


def _calls(text: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn: JSON text of {name, arguments}, or of a list of them."""
    calls = _parsed(text, place, origin)
    calls = _objects([calls] if isinstance(calls, dict) else calls, place, origin)
    for call in calls:
        if "name" not in call and "function" not in call:
            raise ValueError(f"{origin}: {place} is {shown(call)}; expected a call {{name, arguments}}")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as templates take it, {type, function: {name, arguments}}.

    >>> _call({"name": "look", "arguments": {}})
    {'type': 'function', 'function': {'name': 'look', 'arguments': {}}}
    """
    call = _with_keys(call)
    return call if "function" in call or "name" not in call else {"type": "function", "function": call}


def _with_keys(item: dict[str, Any]) -> dict[str, Any]:
    """A call or a tool without those of its own keys, and of its function's, that are null.

    Nulls further in are data: `arguments` and `parameters` hold free JSON, which says null where it means it.

    >>> _with_keys({"id": None, "function": {"name": "look", "strict": None, "arguments": {"at": None}}})
    {'function': {'name': 'look', 'arguments': {'at': None}}}
    """
    present = {key: value for key, value in item.items() if value is not None}
    function = present.get("function")
    if isinstance(function, dict):
        present["function"] = {key: value for key, value in function.items() if value is not None}
    return present


def _is_void(value: Any) -> bool:
    """Whether a value is null, or an object of nothing but nulls, as files write for a call that a turn does not make.

    >>> _is_void({"name": None, "arguments": {"at": None}}), _is_void({"name": "look", "arguments": {}})
    (True, False)
    """
    return all(map(_is_void, value.values())) if isinstance(value, dict) else value is None


def _objects(value: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """A list of objects, each or all of them as JSON text too."""
    values = _parsed(value, place, origin)
    if not isinstance(values, list):
        raise ValueError(f"{origin}: {place} is {kind(values)}; expected a list of objects, or JSON text of one")
    objects = [
        _parsed(item, f"{place}[{index}]", origin) if isinstance(item, str) else item
        for index, item in enumerate(values)
    ]
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"{origin}: {place}[{index}] is {kind(item)}; expected an object")
    return objects


def _parsed(value: Any, place: str, origin: str) -> Any:
    """JSON text as the value it holds; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{origin}: {place} is a string that is not JSON ({error}): {shown(value)}") from None
