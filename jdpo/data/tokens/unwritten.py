"""Content of a completion that the chat template does not write: its reasoning, its tool calls.

Such content is not learnt, and a side of which nothing is left would teach a model to answer with nothing. Only the
answer is checked: reasoning models are used with templates that leave out the thoughts of earlier turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.tool_calls import parse_object
from jdpo.data.tokens import call_arguments
from jdpo.data.tokens.prompt_end import common_prefix
from jdpo.data.tokens.row_notes import words
from jdpo.data.tokens.row_rendering import Written, conversation, write_emptied
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message

REASONING_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thinking_content",
    "thought",
    "thoughts",
    "tool_plan",
)
"""Keys of a message under which files store the reasoning before an answer."""

TOOL_CALLS = "tool calls"

UNWRITTEN = {
    kind: f"with {kind} in an answer that the chat template does not write" for kind in (*REASONING_KEYS, TOOL_CALLS)
}
"""Kind of content -> the name under which rows that lose it are counted."""

EMPTY_UNWRITTEN = "a side is empty because the chat template does not write what it holds"
IDENTICAL_UNWRITTEN = "sides are identical because the chat template does not write what they differ in"


def unwritten_notes(written: Written) -> tuple[str, ...]:
    """Returns notes on the content of the completions that is not in the rendered text."""
    sides = map(conversation, written.row.completions)
    answers = [_answer(written.asked, whole) for whole in written.wholes]
    found = {kind for side, answer in zip(sides, answers, strict=True) for kind in _unwritten(side, answer)}
    return tuple(note for kind, note in UNWRITTEN.items() if kind in found)


def lost_sides(written: Written, completions: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Dropped | None:
    """Drops a row of which the template renders a side as empty, or two different sides as the same.

    Args:
      written: the row.
      completions: token ids of its sides.
      tokenizer: a tokenizer with a chat template.

    Returns:
      None if the row is not dropped.
    """
    row = written.row
    sides = [conversation(completion) for completion in row.completions]
    for number, (side, whole) in enumerate(zip(sides, written.wholes, strict=True)):
        answer = _answer(written.asked, whole)
        # Rendering again is expensive, so it is done only if the answer's text was not found.
        if _may_be_empty(side[-1], answer) and _is_empty(written, number, tokenizer):
            return Dropped(EMPTY_UNWRITTEN, row.origin, _named(list(_unwritten(side, answer))))
    if len(sides) == 2 and completions[0] == completions[1] and _content(sides[0]) != _content(sides[1]):
        answers = [_answer(written.asked, whole) for whole in written.wholes]
        kinds = [kind for side, answer in zip(sides, answers, strict=True) for kind in _unwritten(side, answer)]
        return Dropped(IDENTICAL_UNWRITTEN, row.origin, _named(kinds))
    return None


def _named(kinds: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(kinds)) or "part of the content"


def _answer(asked: str, whole: str) -> str:
    """Returns what a rendered conversation has after the text that it shares with the prompt."""
    return whole[len(common_prefix(asked, whole)) :]


def _may_be_empty(message: Message, answer: str) -> bool:
    """Returns whether an answer's content is missing in the text, so that it must be rendered again to be sure."""
    content = words(message).strip()
    return not content or content not in answer


def _is_empty(written: Written, number: int, tokenizer: Tokenizer) -> bool:
    """Returns whether a side is rendered in the same way as an empty answer."""
    emptied = write_emptied(written.row, number, tokenizer)
    # startswith, because the header of a next answer may have been cut off the conversation.
    return emptied is not None and emptied.startswith(written.wholes[number])


def _content(side: Sequence[Message]) -> list[Any]:
    """Returns the text, reasoning and calls of a side for comparing, without outer whitespace and ids of calls."""
    return [
        (words(message).strip(), list(_reasoning(message)), [_call(call) for call in message.get("tool_calls") or ()])
        for message in side
    ]


def _unwritten(side: Sequence[Message], answer: str) -> Iterator[str]:
    """Yields the kinds of content of a side that are missing in a text."""
    for kind, texts in _reasoning(side[-1]):
        if not all(_has(answer, text) for text in texts):
            yield kind
    calls = [_call(call) for message in side for call in message.get("tool_calls") or ()]
    if not all(_has_call(answer, name, arguments) for name, arguments in calls):
        yield TOOL_CALLS


def _reasoning(message: Message) -> Iterator[tuple[str, list[str]]]:
    """Yields (key, texts) for the reasoning in a message."""
    for key in REASONING_KEYS:
        parts = _leaves(message.get(key), leave_out="type")
        texts = [text for text in parts if isinstance(text, str) and text.strip()]
        if texts:
            yield key, texts


def _call(call: Any) -> tuple[str, Any]:
    """Returns the name of a call and its arguments, parsed if they are JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict):
        return "", None
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_object(arguments) or arguments
    return str(function.get("name", "")), arguments


def _has_call(text: str, name: str, arguments: Any) -> bool:
    """Returns whether a text has the name of a call and all values of its arguments, in any notation."""
    return name in text and all(_has(text, value) for value in _leaves(arguments))


def _leaves(value: Any, leave_out: str | None = None) -> Iterator[Any]:
    """Yields the values inside lists and objects, except those under the key `leave_out`."""
    # A stack instead of recursion: arguments may be nested deeply.
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [inner for key, inner in item.items() if key != leave_out]
        elif isinstance(item, list):
            pending += item
        elif item is not None:
            yield item


def _has(text: str, value: Any) -> bool:
    """Returns whether a text has a value: as it is, as JSON writes it, or with other whitespace between words.

    >>> _has('{"place": "S\\u00e3o Paulo"}', "São Paulo"), _has("{'sunny': True}", True), _has("7", 8)
    (True, True, False)
    """
    forms = call_arguments.spellings(value)
    if not forms or any(form in text for form in forms):
        return True
    # Templates may wrap or indent a text.
    return isinstance(value, str) and " ".join(value.split()) in " ".join(text.split())
