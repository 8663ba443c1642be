"""Generated conversations for `token_rules.py`, in which every word shows the part of the row that it belongs to.

    ask00001   the words of a question          say00004   the words of an answer
    sys00002   of the system turn               mul00005   the thought of an answer
    res00003   the result of a tool             arg00006   an argument of a call

No word occurs twice in a row, so "the completion holds text of the prompt" is a search for words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, Any]

WORD = re.compile(r"(?:ask|sys|res|say|mul|arg|use|not)\d{5}")  # plain: as it is
"""A word of a generated row."""

SHAPES = (
    "{} is it.",
    "  {}, with spaces. ",
    "\n{} after a newline",
    "{}\n\nand {}, twice\n",
    "« {} » é 😀",
    "{}",
)
"""Layouts of an answer's words: templates trim them, and newlines merge with those of headers."""


class Conversation(NamedTuple):
    """A prompt, two answers to it and the tools that both may call."""

    prompt: list[Message]
    answers: tuple[Message, Message]
    tools: list[dict[str, Any]] | None
    origin: str


def conversations(count: int, seed: int) -> list[Conversation]:
    """Generates conversations of every kind; the seed determines them."""
    rng = random.Random(seed)
    return [_conversation(rng, number) for number in range(count)]


def words_of(message: Message) -> set[str]:
    """Returns every generated word of a message, in its content, thought or call."""
    return set(WORD.findall(repr(message)))


def _conversation(rng: random.Random, number: int) -> Conversation:
    counter = iter(range(10**5))

    def word(kind: str) -> str:
        return f"{kind}{next(counter):05d}"

    tools = [_tool(word) for _ in range(rng.randint(1, 2))] if rng.random() < 0.35 else None
    prompt = [{"role": "system", "content": f"Be {word('sys')}."}] if rng.random() < 0.5 else []
    for _ in range(rng.choice((0, 0, 1, 2))):
        prompt += [_question(rng, word)]
        if tools and rng.random() < 0.6:
            prompt += [_call(tools, rng, word), {"role": "tool", "content": f"{{{word('res')}}}"}]
        prompt += [_answer(rng, word)]
    prompt += [_question(rng, word)]
    end = rng.random()
    if tools and end < 0.3:
        prompt += [_call(tools, rng, word), {"role": "tool", "content": f"{{{word('res')}}}"}]
    elif end > 0.85:
        prompt += [{"role": "assistant", "content": f"{word('say')} begins"}]  # plain: as it is
    answers = [_call(tools, rng, word) if tools and rng.random() < 0.35 else _answer(rng, word) for _ in range(2)]
    return Conversation(prompt, (answers[0], answers[1]), tools, f"generated:{number}")


def _question(rng: random.Random, word: Callable[[str], str]) -> Message:
    return {"role": "user", "content": rng.choice(SHAPES).format(word("ask"), word("ask"))}


def _answer(rng: random.Random, word: Callable[[str], str]) -> Message:
    content = rng.choice(SHAPES).format(word("say"), word("say"))  # plain: as it is
    thought = rng.random()
    if thought < 0.2:
        return {"role": "assistant", "content": f"<think>\n{word('mul')}\n</think>\n\n{content}"}
    if thought < 0.3:
        return {"role": "assistant", "content": content, "reasoning_content": word("mul")}
    return {"role": "assistant", "content": content}


def _tool(word: Callable[[str], str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"of": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": word("use"), "description": f"Does {word('not')}.", "parameters": parameters},
    }


def _call(tools: list[dict[str, Any]], rng: random.Random, word: Callable[[str], str]) -> Message:
    """Returns a turn with a call, perhaps after a thought. The tool's name occurs in both prompt and answer."""
    function = {"name": rng.choice(tools)["function"]["name"], "arguments": {"of": word("arg")}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    return call | {"reasoning_content": word("mul")} if rng.random() < 0.3 else call
