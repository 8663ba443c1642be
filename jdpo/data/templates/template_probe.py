"""What a chat template does, found by rendering a question and its answer with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from jdpo.data.templates.chat_template import BoundExceeded, RenderingTooSlow
from jdpo.data.templates.renderer import Renderer
from jdpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER, SYSTEM = "jdpoquestion", "jdpoanswer", "jdposystem"
TURNS: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

_SYSTEM_TURN: Message = {"role": "system", "content": SYSTEM}
_TOOL = {
    "type": "function",
    "function": {
        "name": "jdpotool",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
_MARKER = re.compile(r"(?<!<)<[^<>\s]*\w[^<>\s]*>(?!>)")
"""What counts as a marker of a template, one word in one pair of angle brackets: `<|im_start|>`, `</s>`, not `<<SYS>>`.
"""


@dataclass(frozen=True)
class Probe:
    """A question and its answer as a template writes them.

    Attributes:
      renderer: with contents in the form that the template takes.
      system: whether the template wants a system turn before them.
      tools: what it wants the conversation to have as tools; None: none.
      text: what it writes; empty without a template, or where it fails whatever it is given.
      refusal: what it says to a question and its answer alone; None: nothing.
    """

    renderer: Renderer
    system: bool = False
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    refusal: Exception | None = None

    def render(self, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Turns together with what the template wants around them.

        Raises:
          Exception: what the template raises.
        """
        return self.renderer.render(
            [*([_SYSTEM_TURN] if self.system else []), *turns],
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
        )

    @property
    def wants(self) -> str:
        """What a question and its answer need for the template to write them, in words; empty: nothing."""
        return " and ".join(
            words
            for words, is_wanted in (("tools", self.tools is not None), ("a system turn", self.system))
            if is_wanted
        )


def probe(renderer: Renderer) -> Probe:
    """Renders a question and its answer: alone, then with tools, with a system turn, and with contents as parts.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    written: Probe | None = None
    refusal: Exception | None = None
    for takes_parts, tools, system in [
        (parts, tools, system) for parts in (False, True) for system in (False, True) for tools in (None, [_TOOL])
    ]:
        tried = Probe(renderer.with_parts() if takes_parts else renderer, system, tools)
        if renderer.template_for(tools) is None:
            continue
        try:
            text = tried.render(TURNS)
        except RenderingTooSlow:
            raise
        except Exception as error:  # a template runs expressions, which raise whatever Python raises
            refusal = refusal or error
            if isinstance(error, BoundExceeded | jinja2.TemplateSyntaxError):
                break
            continue
        # A template that takes parts refuses nothing: it finds none in a string, and leaves the words out.
        found = Probe(tried.renderer, system, tools, text, None if takes_parts else refusal)
        if ANSWER in text:
            return found
        written = written or found
    return written or Probe(renderer, refusal=refusal)


def markers_of(probed: Probe) -> list[str]:
    """The markers that a template writes around turns of every kind that it takes, in order.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    texts = []
    for turns in ([_SYSTEM_TURN, *TURNS], TURNS):
        for conversation, asks in ((turns, False), (turns[:-1], True)):
            try:
                texts.append(probed.renderer.render(conversation, tools=probed.tools, add_generation_prompt=asks))
            except RenderingTooSlow:
                raise
            except Exception:  # templates without a system turn refuse one; the probe itself has passed
                continue
    return list(dict.fromkeys(_MARKER.findall("".join([*texts, probed.text]))))


def end_of_turn(hf: PreTrainedTokenizerBase, probed: Probe) -> str | None:
    """The first special token that the template writes after an assistant's words."""
    _, found, tail = probed.text.rpartition(ANSWER)
    tokens = sorted({*hf.all_special_tokens, *hf.get_added_vocab()}, key=len, reverse=True)
    match = re.search("|".join(map(re.escape, tokens)), tail) if found and tokens else None
    return match.group() if match else None


def lead_of_answers(probed: Probe) -> str:
    """The text between the generation prompt and an answer: an empty thought, or a header for want of one.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    if not probed.text:
        return ""
    try:
        prompt = probed.render(TURNS[:1], add_generation_prompt=True)
    except RenderingTooSlow:
        raise
    except Exception:  # it wants a conversation of another kind; rows it refuses are counted
        return ""
    return probed.text[len(prompt) :].partition(ANSWER)[0] if probed.text.startswith(prompt) else ""
