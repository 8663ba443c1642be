"""Properties of a chat template, found by rendering a question and its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2

from jdpo.data.templates.chat_template import BoundExceeded, RenderingTooSlow
from jdpo.data.templates.renderer import Renderer
from jdpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that no template contains, so that they can be found in its output.
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
"""A marker of a template: one word in one pair of angle brackets, like `<|im_start|>` or `</s>`, not `<<SYS>>`."""


@dataclass(frozen=True)
class Probe:
    """A question and its answer as rendered by a template.

    Attributes:
      renderer: a renderer that gives contents in the form that the template takes.
      system: whether the template needs a system turn before them.
      tools: tools that the template needs; None: it needs none.
      text: the rendered text; empty without a template, or if the template refuses all forms of the conversation.
      refusal: the error for the question and its answer alone; None if there was none.
    """

    renderer: Renderer
    system: bool = False
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    refusal: Exception | None = None

    def render(
        self,
        turns: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders turns, with the system turn and the tools that the template needs.

        Args:
          kwargs: `chat_template_kwargs` of a row.

        Raises:
          Exception: any exception of the template.
        """
        return self.renderer.render(
            [*([_SYSTEM_TURN] if self.system else []), *turns],
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
            kwargs=kwargs,
        )

    @property
    def wants(self) -> str:
        """The needs of the template besides a question and its answer, in words; empty if there are none."""
        return " and ".join(
            words
            for words, is_wanted in (("tools", self.tools is not None), ("a system turn", self.system))
            if is_wanted
        )


def probe(renderer: Renderer) -> Probe:
    """Renders a question and its answer: alone, then with tools, with a system turn, and with contents as parts.

    Returns:
      The first probe whose text has the answer, else the first that was rendered at all.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    written: Probe | None = None
    refusal: Exception | None = None
    for takes_parts, tools, system in [
        # The simplest form comes first; it is the form of most rows.
        (parts, tools, system)
        for parts in (False, True)
        for system in (False, True)
        for tools in (None, [_TOOL])
    ]:
        tried = Probe(renderer.with_parts() if takes_parts else renderer, system, tools)
        if renderer.template_for(tools) is None:
            continue
        try:
            text = tried.render(TURNS)
        except RenderingTooSlow:
            raise
        except Exception as error:  # expressions of a template raise any exception of Python
            refusal = refusal or error
            # No other form of the conversation would change this.
            if isinstance(error, BoundExceeded | jinja2.TemplateSyntaxError):
                break
            continue
        # A template that takes parts does not refuse a string: it finds no parts in it, and leaves the text out.
        found = Probe(tried.renderer, system, tools, text, None if takes_parts else refusal)
        # A text without the answer is only taken if no form gives one with it.
        if ANSWER in text:
            return found
        written = written or found
    return written or Probe(renderer, refusal=refusal)


def markers_of(probed: Probe) -> list[str]:
    """Returns the markers that a template writes around turns of all kinds, in their order.

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
            except Exception:  # templates without system turns refuse them; the probe itself was rendered
                continue
    # Without duplicates, in the order of first use: new tokens must get the same ids in every run.
    markers = list(dict.fromkeys(_MARKER.findall("".join([*texts, probed.text]))))
    # A call may end with a marker that nothing else has, and generation must stop there.
    closing = _MARKER.findall(_after_call(probed))
    return markers if not closing or set(closing) & set(markers) else [*markers, closing[-1]]


def end_of_turn(hf: PreTrainedTokenizerBase, probed: Probe) -> str | None:
    """Returns the special token with which the template ends an answer, or None.

    It is the first one after the answer that does not merely close a part of the turn, as `<|END_RESPONSE|>` does in
    `<|START_RESPONSE|>Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`.
    """
    before, found, tail = probed.text.rpartition(ANSWER)
    tokens = _special_tokens(hf).findall(tail) if found else []
    lead = lead_of_answers(probed)
    opened = _special_tokens(hf).findall(lead)
    earlier = before.removesuffix(lead)
    closing = [token for token in tokens if token not in earlier and any(_closes(token, one) for one in opened)]
    return next((token for token in tokens if token not in closing), tokens[0] if tokens else None)


def end_of_call(hf: PreTrainedTokenizerBase, probed: Probe, ends: Collection[str]) -> str | None:
    """Returns the special token that ends a turn with a call, where none of `ends` does; else None.

    Harmony ends an answer with `<|return|>`, and a call with `<|call|>`, after which the result of the tool follows.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    tail = _after_call(probed)
    tokens = _special_tokens(hf).findall(tail)
    # Words after the token belong to something else, such as the header of a next turn.
    if not tokens or any(token in ends for token in tokens) or tail.rpartition(tokens[-1])[2].strip():
        return None
    return str(tokens[-1])


def _after_call(probed: Probe) -> str:
    """Returns what a template writes after the last argument of a call; empty if it writes no calls."""
    # A few templates want the arguments as text.
    for arguments in ({"value": ANSWER}, json.dumps({"value": ANSWER})):
        call = {"id": "jdpocalls", "type": "function", "function": {"name": "jdpotool", "arguments": arguments}}
        turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = replace(probed, tools=[_TOOL]).render([TURNS[0], turn])
        except RenderingTooSlow:
            raise
        except Exception:  # whatever the template raises: rows that it refuses are counted
            continue
        _, found, tail = text.rpartition(ANSWER)
        return tail if found else ""
    return ""


def _special_tokens(hf: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Returns a pattern for the special and added tokens of a tokenizer."""
    # Longer tokens first, since a pattern takes the first alternative that matches.
    tokens = sorted({*hf.all_special_tokens, *hf.get_added_vocab()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _closes(token: str, opening: str) -> bool:
    """Returns whether two markers enclose a part of a text.

    >>> _closes("<|END_TEXT|>", "<|START_TEXT|>"), _closes("</think>", "<think>"), _closes("<|end|>", "<|message|>")
    (True, True, False)
    """
    ways = (("START", "END"), ("start", "end"), ("begin", "end"), ("prefix", "suffix"))
    closings = [opening[:1] + "/" + opening[1:], *(opening.replace(start, end) for start, end in ways)]
    return token != opening and token in closings


def lead_of_answers(probed: Probe) -> str:
    """Returns the text between the generation prompt and an answer, such as an empty thought or a header.

    Raises:
      RenderingTooSlow: the template takes more than a minute.
    """
    if not probed.text:
        return ""
    try:
        prompt = probed.render(TURNS[:1], add_generation_prompt=True)
    except RenderingTooSlow:
        raise
    except Exception:  # the template needs another kind of conversation; rows that it refuses are counted
        return ""
    return probed.text[len(prompt) :].partition(ANSWER)[0] if probed.text.startswith(prompt) else ""
