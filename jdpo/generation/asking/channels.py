"""Answers in channels, as gpt-oss writes them in the harmony format: a thought, calls of functions, and the answer.

    <|channel|>analysis<|message|>Of Ireland.<|end|><|start|>assistant<|channel|>final<|message|>Dublin.<|return|>

Every message has a header with its channel and, for a call, its recipient. The generation prompt opens the first one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jdpo.data.schemas.messages import assistant
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message

_MESSAGE = "<|message|>"
_MARKS = ("<|start|>", "<|channel|>", _MESSAGE, "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_SPLIT = re.compile(f"({'|'.join(map(re.escape, _MARKS))})")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.\-]+)")
_ANALYSIS = "analysis"


def has_channels(tokenizer: Tokenizer) -> bool:
    """Returns whether a model's answers are in channels."""
    return {"<|channel|>", _MESSAGE} <= tokenizer.hf.get_added_vocab().keys()


class Spoken(NamedTuple):
    """Text of one message.

    Attributes:
      number: of the message, from 1.
      channel: `analysis`, `commentary` or `final`; empty if the header names none.
      recipient: what the message calls, such as `functions.look`; empty if it calls nothing.
      text: a part of its text; empty at its start.
    """

    number: int
    channel: str
    recipient: str
    text: str


class ChannelReader:
    """Reads an answer piece by piece. A piece has whole markers, which are single tokens."""

    def __init__(self) -> None:
        self.header = ""
        """The header that is being read, which no text belongs to yet."""
        self._number = 0
        self._message: Spoken | None = None

    def feed(self, piece: str) -> Iterator[Spoken]:
        """Yields the texts that a piece adds to messages; an empty text where a message starts."""
        for part in _SPLIT.split(piece):
            if part == _MESSAGE and self._message is None:
                self._number += 1
                channel, recipient = (
                    found[1] if (found := pattern.search(self.header)) else "" for pattern in (_CHANNEL, _RECIPIENT)
                )
                self.header, self._message = "", Spoken(self._number, channel, recipient, "")
                yield self._message
            elif part in _MARKS:
                # Any marker ends a message, also where the model has left its end out.
                self._message = None
                self.header += part
            elif self._message is None:
                self.header += part
            elif part:
                yield self._message._replace(text=part)


class ChannelView:
    """The view that a person has of an answer in channels: a line per message, which names its channel."""

    def __init__(self) -> None:
        self._reader = ChannelReader()

    def push(self, piece: str) -> str:
        """Returns what one more piece of the answer shows."""
        return "".join(one.text or _label(one) for one in self._reader.feed(piece))

    def finish(self) -> str:
        """Returns what the model wrote as a header that no message follows, as it is."""
        return self._reader.header


def _label(one: Spoken) -> str:
    name = " to ".join(filter(None, (one.channel, one.recipient)))
    return ("\n" if one.number > 1 else "") + (f"[{name}] " if name else "")


def read_channels(text: str) -> Message | None:
    """Returns an answer as a message: analysis as reasoning, calls with their arguments, all other text as content.

    Args:
      text: the answer after the generation prompt, with its markers. If it is cut off, what is there is read.

    Returns:
      None if the answer has no channels, or a call whose arguments are not an object.

    >>> read_channels("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.")
    {'role': 'assistant', 'content': 'Yes.', 'reasoning_content': 'Hm.'}
    """
    found: dict[int, Spoken] = {}
    for one in ChannelReader().feed(text):
        earlier = found.get(one.number)
        found[one.number] = one if earlier is None else earlier._replace(text=earlier.text + one.text)
    calls = [_call(one) for one in found.values() if one.recipient]
    if not found or None in calls:
        return None
    words = [one for one in found.values() if not one.recipient]
    message = assistant("\n\n".join(one.text for one in words if one.channel != _ANALYSIS))
    thought = "\n\n".join(one.text for one in words if one.channel == _ANALYSIS)
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _call(one: Spoken) -> dict[str, Any] | None:
    try:
        arguments = json.loads(one.text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict):
        return None
    return {
        "type": "function",
        "function": {"name": one.recipient.removeprefix("functions."), "arguments": arguments},
    }
