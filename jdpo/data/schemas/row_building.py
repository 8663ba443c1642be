"""A prompt and its answers as rows: one conversation a side, cut before its final assistant turn.

A column `system` becomes the first turn. With it, or with `tools`, plain text becomes a conversation, since only a
chat template can write them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from jdpo.data.schemas import messages
from jdpo.data.schemas.comparing import comparable
from jdpo.data.schemas.describing import kind, named
from jdpo.data.schemas.messages import Raw
from jdpo.data.schemas.ranked import Answer, Couple, Dropped, margin
from jdpo.data.schemas.tool_calls import read_tools
from jdpo.types import CompletionRow, Message, PreferenceRow, Text

EMPTY_SIDE = "empty side"
HISTORIES_DIFFER = "histories differ"
NO_ASSISTANT_TURN = "no assistant turn at the end"
NO_SHARED_TURN = "no prompt: the sides share no turn"
PROMPT_ELSEWHERE = "prompt is not that of the conversation"
SYSTEM_ELSEWHERE = "system column is not the system turn of the conversation"

STARTS_WITH_ANSWER = "whose conversation starts with an assistant turn, as nothing was taken as its prompt"

UNREAD = {
    "images": "jdpo trains on text alone",
    "image": "jdpo trains on text alone",
}
"""Columns that other trainers read and that change what is learnt, and why a row that has one is refused."""


class Frame(NamedTuple):
    """What goes with a conversation: the words of its system turn, the tools that it may call, and what the chat
    template is told."""

    system: str | None
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any] | None = None

    @property
    def is_chat(self) -> bool:
        return self.system is not None or self.tools is not None or self.template_kwargs is not None


def read_frame(columns: Raw, origin: str) -> Frame:
    """The columns `system`, `tools` and `chat_template_kwargs` of a row; empty ones count as absent.

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
    return Frame(system if system and system.strip() else None, tools, _read_kwargs(columns, origin))


def _read_kwargs(columns: Raw, origin: str) -> dict[str, Any] | None:
    value = columns.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError):  # other text is refused below
            value = json.loads(value)
    if not value:
        return None
    if not isinstance(value, dict):
        raise ValueError(
            f"{origin}: chat_template_kwargs is {kind(value)}; expected an object such as {{enable_thinking: false}}"
        )
    return value


def pair_row(
    prompt: Text, pair: Couple, frame: Frame, origin: str, *, every_turn: bool = False
) -> PreferenceRow | Dropped:
    """A pair of answers as a row; what stands before both final assistant turns must be equal.

    Args:
      every_turn: it may differ too: then the prompt is what both sides begin with, and a side all that follows.
    """
    if any(answer.text == [] for answer in pair):
        return Dropped(EMPTY_SIDE, origin)
    dropped = said_by_another(pair, origin)
    if dropped is not None:
        return dropped
    chosen, rejected = (answer_row(prompt, answer.text, frame, origin) for answer in pair)
    if isinstance(chosen, Dropped):
        return chosen
    if isinstance(rejected, Dropped):
        return rejected
    if comparable(chosen.prompt) != comparable(rejected.prompt):
        if not every_turn:
            return Dropped(HISTORIES_DIFFER, origin)
        return _parted(chosen, rejected)._replace(
            margin=margin(*pair), tools=frame.tools, template_kwargs=frame.template_kwargs
        )
    return PreferenceRow(
        chosen.prompt,
        chosen.completion,
        rejected.completion,
        origin,
        margin(*pair),
        frame.tools,
        template_kwargs=frame.template_kwargs,
    )


def said_by_another(answers: Sequence[Answer], origin: str) -> Dropped | None:
    """Names the side, chosen first, whose last turn is not the assistant's; None where both are."""
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        role = answer.text[-1]["role"] if answer.text and not isinstance(answer.text, str) else "assistant"
        if role != "assistant":
            return Dropped(f"{NO_ASSISTANT_TURN}: the last turn of {name} has the role {role}", origin)
    return None


def whole_pair(row: PreferenceRow, columns: Raw) -> PreferenceRow | Dropped:
    """Checks a pair whose prompt is what its sides begin with.

    Args:
      row: the pair.
      columns: those of its raw row, for advice.

    Returns:
      The row, with a note where a conversation starts with the assistant; Dropped if the sides share no turn.
    """
    if isinstance(row.prompt, str):
        return row
    if not row.prompt:
        advice = (
            "name the column that both answer in column_map, as in {prompt: <column>}, or begin both sides with the "
            f"conversation; the columns are {named(columns)}"
        )
        return Dropped(NO_SHARED_TURN, row.origin, advice)
    first = next((turn for turn in row.prompt if turn["role"] != "system"), None)
    starts = first is None or first["role"] == "assistant"
    return row._replace(notes=(*row.notes, STARTS_WITH_ANSWER)) if starts else row


def _parted(chosen: CompletionRow, rejected: CompletionRow) -> PreferenceRow:
    """Two conversations as the messages that both begin with, and the rest of each."""
    sides = []
    for row in (chosen, rejected):
        assert not isinstance(row.prompt, str)
        assert not isinstance(row.completion, str)
        sides.append([*row.prompt, *row.completion])
    pairs = zip(*map(comparable, sides), strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, sides)))
    return PreferenceRow(sides[0][:shared], sides[0][shared:], sides[1][shared:], chosen.origin)


def answer_row(prompt: Text, answer: Text, frame: Frame, origin: str) -> CompletionRow | Dropped:
    """A prompt and an answer as a row: plain text as it is, a conversation cut before its final assistant turn."""
    if isinstance(answer, str) and not frame.is_chat:
        assert isinstance(prompt, str)
        return CompletionRow(prompt, answer, origin)
    side = [messages.assistant(answer)] if isinstance(answer, str) else answer
    if not side:
        return Dropped(EMPTY_SIDE if prompt else NO_ASSISTANT_TURN, origin)
    if side[-1]["role"] != "assistant":
        return Dropped(NO_ASSISTANT_TURN, origin, f"the last turn has the role {side[-1]['role']}")
    conversation = messages.joined(prompt, side)
    if conversation is None:
        return Dropped(PROMPT_ELSEWHERE, origin)
    framed = _with_system(conversation, frame.system)
    if framed is None:
        return Dropped(SYSTEM_ELSEWHERE, origin)
    return CompletionRow(framed[:-1], framed[-1:], origin, frame.tools, template_kwargs=frame.template_kwargs)


def _with_system(conversation: list[Message], system: str | None) -> list[Message] | None:
    """The conversation behind its system turn; None where it has another one."""
    if system is None:
        return conversation
    if conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    return conversation if conversation[0]["content"].strip() == system.strip() else None
