"""Notes on rows whose tokens differ from what their file contains.

The rows are kept, since the model sees the same tokens at inference. But each note is a difference between the file and
what is learnt, so the number of such rows is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message, Text

SPELLS_SPECIAL = "whose own text spells special tokens, which are read as such"
ANSWER_CHANGED = "with an answer that the chat template does not write letter for letter (spaces trimmed?)"
TURN_CHANGED = "with an earlier turn that the chat template leaves out or does not write whole"
TOOLS_UNUSED = "with tools that the chat template does not write"


def conversation_notes(
    prompt: Sequence[Message],
    completions: Sequence[Sequence[Message]],
    tools: Sequence[dict[str, Any]] | None,
    texts: Sequence[str],
    tokenizer: Tokenizer,
) -> tuple[str, ...]:
    """Returns notes on what the chat template did with the content of a conversation.

    Args:
      prompt: the messages before the answer.
      completions: the messages of each answer.
      tools: the tools that the conversation may call.
      texts: the rendered prompt, then the rendered conversation with each of the completions.
    """
    written, *wholes = texts
    messages = [*prompt, *(message for completion in completions for message in completion)]
    found = {
        SPELLS_SPECIAL: any(tokenizer.special_text.search(words(message)) for message in messages),
        # strip: templates trim whitespace around earlier turns, which nobody needs to know.
        TURN_CHANGED: any(text.strip() not in written for text in map(words, prompt)),
        ANSWER_CHANGED: any(
            words(message) not in (whole.removeprefix(written) if whole.startswith(written) else whole)
            for completion, whole in zip(completions, wholes, strict=True)
            for message in completion
        ),
        # By name, since templates write the schema of a tool in forms of their own.
        TOOLS_UNUSED: any(_tool_name(tool) not in written for tool in tools or ()),
    }
    return tuple(note for note, applies in found.items() if applies)


def text_notes(prompt: str, completions: Iterable[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Notes if plain text spells special tokens, apart from a BOS at its start and an EOS at its end."""
    bos = tokenizer.hf.bos_token if tokenizer.bos_token_id is not None else None
    eos = tokenizer.hf.eos_token
    assert isinstance(eos, str)
    # Files of plain text often contain these two tokens on purpose.
    texts = [prompt.removeprefix(bos or ""), *(completion.removesuffix(eos) for completion in completions)]
    return (SPELLS_SPECIAL,) if any(map(tokenizer.special_text.search, texts)) else ()


def words(message: Message) -> str:
    """Returns the content of a message; empty for a message that only calls functions."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def has_words(text: Text) -> bool:
    """Returns whether a completion has content or calls."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(words(message).strip() or message.get("tool_calls") for message in text)


def all_words(text: Text) -> str:
    """Returns all text of a part of a row that may reach the tokens, for searching in it.

    >>> all_words([{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}])
    '[{"name": "look"}]'
    """
    if isinstance(text, str):
        return text
    calls = (message.get("tool_calls") for message in text)
    return "".join(map(words, text)) + "".join(
        json.dumps(call, ensure_ascii=False, default=str) for call in calls if call
    )


def _tool_name(tool: dict[str, Any]) -> str:
    """Returns the name of a tool in the form {type, function: {name, ...}} or {name, ...}; empty if it has none."""
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else ""
