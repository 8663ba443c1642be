"""A prompt and its answers as rows: one conversation a side, cut before its final assistant turn.

A column `system` becomes the first turn. With it, or with `tools`, plain text becomes a conversation, since only a
chat template can write them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jdpo.data import messages
from jdpo.data.describing import kind
from jdpo.data.messages import Raw
from jdpo.data.ranked import Couple, Dropped, margin
from jdpo.data.splitting import said
from jdpo.data.tool_calls import read_tools
from jdpo.types import CompletionRow, Message, PreferenceRow, Text

EMPTY_SIDE = "empty side"
HISTORIES_DIFFER = "histories differ"
NO_ASSISTANT_TURN = "no assistant turn at the end"
PROMPT_ELSEWHERE = "prompt is not that of the conversation"
SYSTEM_ELSEWHERE = "system column is not the system turn of the conversation"


UNREAD = {
    "images": "jdpo trains on text alone",
    "image": "jdpo trains on text alone",
    "chat_template_kwargs": "jdpo renders every row alike; give it a `chat_template` that writes what they ask",
}
"""Columns that other trainers read and that change what is learnt, and why a row that has one is refused."""


class Frame(NamedTuple):
    """What stands around a conversation: the words of its system turn, and the tools that it may call."""

    system: str | None
    tools: list[dict[str, Any]] | None

    @property
    def is_chat(self) -> bool:
        return self.system is not None or self.tools is not None


def read_frame(columns: Raw, origin: str) -> Frame:
    """The columns `system` and `tools` of a row; empty ones count as absent.

    Raises:
      ValueError: they are not a string, or not a list of objects (or JSON text of one); or there is a column of
        `UNREAD`.
    """
    for name, why in UNREAD.items():
        if columns.get(name):
            raise ValueError(
                f"{origin}: the row has {name}, without which it would mean something else: {why}. Leave such rows "
                "out, or the column where it does not matter"
            )
    system = columns.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{origin}: system is {kind(system)}; expected a string, the words of the system turn")
    tools = read_tools(columns.get("tools"), "tools", origin)
    return Frame(system if system and system.strip() else None, tools)


def pair_row(prompt: Text, pair: Couple, frame: Frame, origin: str) -> PreferenceRow | Dropped:
    """A pair of answers as a row; what stands before both final assistant turns must be equal."""
    if any(answer.text == [] for answer in pair):
        return Dropped(EMPTY_SIDE, origin)
    chosen, rejected = (answer_row(prompt, answer.text, frame, origin) for answer in pair)
    if isinstance(chosen, Dropped):
        return chosen
    if isinstance(rejected, Dropped):
        return rejected
    if said(chosen.prompt) != said(rejected.prompt):
        return Dropped(HISTORIES_DIFFER, origin)
    return PreferenceRow(chosen.prompt, chosen.completion, rejected.completion, origin, margin(*pair), frame.tools)


def answer_row(prompt: Text, answer: Text, frame: Frame, origin: str) -> CompletionRow | Dropped:
    """A prompt and an answer as a row: plain text as it is, a conversation cut before its final assistant turn."""
    if isinstance(answer, str) and not frame.is_chat:
        assert isinstance(prompt, str)
        return CompletionRow(prompt, answer, origin)
    side = [messages.assistant(answer)] if isinstance(answer, str) else answer
    if not side:
        return Dropped(EMPTY_SIDE if prompt else NO_ASSISTANT_TURN, origin)
    conversation = messages.joined(prompt, side)
    if conversation is None:
        return Dropped(PROMPT_ELSEWHERE, origin)
    framed = _with_system(conversation, frame.system)
    if framed is None:
        return Dropped(SYSTEM_ELSEWHERE, origin)
    if framed[-1]["role"] != "assistant":
        return Dropped(NO_ASSISTANT_TURN, origin)
    return CompletionRow(framed[:-1], framed[-1:], origin, frame.tools)


def _with_system(conversation: list[Message], system: str | None) -> list[Message] | None:
    """The conversation behind its system turn; None where it has another one."""
    if system is None:
        return conversation
    if conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    return conversation if conversation[0]["content"].strip() == system.strip() else None
