"""What is worth counting of how a chat template and a tokenizer wrote a row.

None of it costs the row: the tokens are those that the model sees at inference too. But each is a way in which what
is learnt differs from what stands in the file, and a user is to be told how often.
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
    """What the chat template did with the words of a conversation.

    Args:
      prompt: the messages before the answer.
      completions: the messages of each answer.
      tools: what the conversation may call.
      texts: the prompt as the template writes it, then the conversation with each of the completions.
    """
    written, *wholes = texts
    messages = [*prompt, *(message for completion in completions for message in completion)]
    found = {
        SPELLS_SPECIAL: any(tokenizer.special_text.search(words(message)) for message in messages),
        TURN_CHANGED: any(text.strip() not in written for text in map(words, prompt)),
        ANSWER_CHANGED: any(
            words(message) not in (whole.removeprefix(written) if whole.startswith(written) else whole)
            for completion, whole in zip(completions, wholes, strict=True)
            for message in completion
        ),
        TOOLS_UNUSED: any(_tool_name(tool) not in written for tool in tools or ()),
    }
    return tuple(note for note, applies in found.items() if applies)


def text_notes(prompt: str, completions: Iterable[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Whether plain text spells special tokens, but for a BOS that begins it and an EOS that ends it."""
    bos = tokenizer.hf.bos_token if tokenizer.bos_token_id is not None else None
    eos = tokenizer.hf.eos_token
    assert isinstance(eos, str)
    texts = [prompt.removeprefix(bos or ""), *(completion.removesuffix(eos) for completion in completions)]
    return (SPELLS_SPECIAL,) if any(map(tokenizer.special_text.search, texts)) else ()


def words(message: Message) -> str:
    """The content of a message; of one that only calls functions, none."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def has_words(text: Text) -> bool:
    """Whether a completion says or calls anything."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(words(message).strip() or message.get("tool_calls") for message in text)


def all_words(text: Text) -> str:
    """Everything in a part of a row that may reach the tokens, to be looked through.

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
    """The name of a tool in the form {type, function: {name, ...}}, or {name, ...}; empty where it has none."""
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else ""
