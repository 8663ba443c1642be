"""Rows made of a prompt and its answers: one conversation per side, cut before its final assistant turn.

A column `system` becomes the first turn. With `system` or `tools`, plain text becomes a conversation, because only a
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

UNREAD = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio"),
    "jdpo trains on text alone, also of a multimodal model",
)
"""Column that other trainers read and that changes what is learnt -> why a row with it is refused."""


class Frame(NamedTuple):
    """Columns that accompany a conversation: its system turn, its tools, and the variables of the chat template."""

    system: str | None
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any] | None = None

    @property
    def is_chat(self) -> bool:
        """True if the row needs a chat template."""
        return self.system is not None or self.tools is not None or self.template_kwargs is not None


def read_frame(columns: Raw, origin: str) -> Frame:
    """Reads the columns `system`, `tools` and `chat_template_kwargs` of a row; empty ones count as absent.

    Raises:
      ValueError: a column has another type than it should, or the row has a column of `UNREAD`.
    """
    for name, why in UNREAD.items():
        # Empty columns do not matter; many files have them only for some rows.
        if columns.get(name):
            raise ValueError(
                f"{origin}: the row has {name}, and would mean something else without it: {why}. Remove such rows, "
                "or the column if it does not matter"
            )
    system = columns.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{origin}: system is {kind(system)}; expected a string, the text of the system turn")
    tools = read_tools(columns.get("tools"), origin)
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
    """Makes a row of a pair of answers, whose messages before the final assistant turn must be equal.

    Args:
      every_turn: allow them to differ; then the prompt is the messages that both sides start with, and a side is
        everything after them.
    """
    if any(answer.text == [] for answer in pair):
        return Dropped(EMPTY_SIDE, origin)
    # Before rows are made, so that the reason names the side and its role.
    dropped = ends_with_other_role(pair, origin)
    if dropped is not None:
        return dropped
    chosen, rejected = (answer_row(prompt, answer.text, frame, origin) for answer in pair)
    if isinstance(chosen, Dropped):
        return chosen
    if isinstance(rejected, Dropped):
        return rejected
    # Compared by content: ids and times of messages may differ between the sides.
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


def ends_with_other_role(answers: Sequence[Answer], origin: str) -> Dropped | None:
    """Drops a pair with a side whose last turn is not the assistant's; returns None if both sides end with one."""
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        role = answer.text[-1]["role"] if answer.text and not isinstance(answer.text, str) else "assistant"
        if role != "assistant":
            return Dropped(f"{NO_ASSISTANT_TURN}: the last turn of {name} has the role {role}", origin)
    return None


def whole_pair(row: PreferenceRow, columns: Raw) -> PreferenceRow | Dropped:
    """Checks a pair whose prompt is the messages that both sides start with.

    Args:
      row: the pair.
      columns: the columns of its raw row, for advice.

    Returns:
      The row, with a note if the conversation starts with the assistant; Dropped if the sides share no turn.
    """
    if isinstance(row.prompt, str):
        return row
    if not row.prompt:
        advice = (
            "name the column that both answer with column_map: {prompt: <column>}, or start both sides with the "
            f"conversation; the columns are {named(columns)}"
        )
        return Dropped(NO_SHARED_TURN, row.origin, advice)
    # Sides that share only a greeting have no question; such rows are kept and noted.
    first = next((turn for turn in row.prompt if turn["role"] != "system"), None)
    starts = first is None or first["role"] == "assistant"
    return row._replace(notes=(*row.notes, STARTS_WITH_ANSWER)) if starts else row


def _parted(chosen: CompletionRow, rejected: CompletionRow) -> PreferenceRow:
    """Splits two conversations into the messages that both start with, and the rest of each."""
    sides = []
    for row in (chosen, rejected):
        assert not isinstance(row.prompt, str)
        assert not isinstance(row.completion, str)
        sides.append([*row.prompt, *row.completion])
    pairs = zip(*map(comparable, sides), strict=False)
    # If one side is a prefix of the other, all its messages are shared, and it is left empty.
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, sides)))
    return PreferenceRow(sides[0][:shared], sides[0][shared:], sides[1][shared:], chosen.origin)


def answer_row(prompt: Text, answer: Text, frame: Frame, origin: str) -> CompletionRow | Dropped:
    """Makes a row of a prompt and an answer; a conversation is cut before its final assistant turn."""
    # Plain text: no chat template is applied, as in TRL.
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
    # After the joining, because the conversation may contain the same system turn.
    framed = with_system(conversation, frame.system)
    if framed is None:
        return Dropped(SYSTEM_ELSEWHERE, origin)
    return CompletionRow(framed[:-1], framed[-1:], origin, frame.tools, template_kwargs=frame.template_kwargs)


def with_system(conversation: list[Message], system: str | None) -> list[Message] | None:
    """Puts the system turn before a conversation; returns None if the conversation has another one."""
    if system is None:
        return conversation
    if conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    return conversation if conversation[0]["content"].strip() == system.strip() else None
