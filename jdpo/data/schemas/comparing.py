"""Conversations reduced to what is compared when two of them are checked for being the same."""

from __future__ import annotations

from jdpo.data.schemas.tool_calls import as_objects
from jdpo.types import Message, Text

_COMPARED_KEYS = ("role", "content", "name", "tool_calls", "reasoning_content", "thinking")
"""Keys of a message that carry its meaning. Others, such as ids and times, differ between equal messages."""


def comparable(prompt: Text) -> list[Message]:
    """Returns a prompt as messages that hold only the keys that are compared.

    >>> comparable([{"role": "user", "content": "Hi", "id": 7}]) == comparable("Hi")
    True
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [
        {
            key: as_objects(message[key]) if key == "tool_calls" else message[key]
            for key in _COMPARED_KEYS
            if key in message
        }
        for message in messages
    ]
