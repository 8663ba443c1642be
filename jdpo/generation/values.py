"""The values that generation passes on: questions, how answers are drawn, and answers. Imports no jax."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

from jdpo.types import Message, Text

FinishReason = Literal["stop", "length"]
"""Why an answer ends: the model ended it, or it was cut off (at `max_new_tokens`, or at the model's last position)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings by which answers are drawn.

    Attributes:
      temperature: divides the logits; 0 always takes the most probable token.
      top_p: draw from the smallest set of most probable tokens with at least this probability in all.
      top_k: draw from this many most probable tokens; None: from all.
      max_new_tokens: largest number of tokens of an answer; also ends at the model's last position.
      seed: of the draws.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        # Not `< 0`, so that NaN is refused as well.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 (greedy) or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and at most 1, found {self.top_p}")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise ValueError(f"top_k: expected 1 or more, or nothing for all tokens, found {self.top_k}")
        if not (_is_whole(self.max_new_tokens) and self.max_new_tokens >= 1):
            raise ValueError(f"max_new_tokens: expected a whole number of 1 or more, found {self.max_new_tokens}")
        if not (_is_whole(self.seed) and 0 <= self.seed < 2**32):
            raise ValueError(f"seed: expected a whole number from 0 to 2**32 - 1, found {self.seed}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral)  # those of numpy as well


class Question(NamedTuple):
    """A prompt to answer.

    Attributes:
      prompt_id: a digest of prompt, tools and template_kwargs, the same in every file and run.
      prompt: the text or conversation to answer.
      origin: file and row, for messages.
      tools, template_kwargs: as in `PreferenceRow`.
      columns: the other columns of the row, such as the right answer.
    """

    prompt_id: str
    prompt: Text
    origin: str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    columns: dict[str, Any] | None = None


class Answer(NamedTuple):
    """One sampled answer to a question.

    Attributes:
      prompt_id: of its question.
      sample: its number, from 0, among the answers to the question.
      message: `{"role": "assistant", "content": ...}`, for plain text prompts as well. A thought before the answer is
        under `reasoning_content`, and calls are under `tool_calls`, where the model's chat template writes them apart.
      tokens: its token ids, including the token that ends it; None: the server did not return them.
      finish_reason: why it ends.
      logp: summed log-probability of `tokens` under the model itself (temperature 1, all tokens); None: not returned.
    """

    prompt_id: str
    sample: int
    message: Message
    tokens: list[int] | None
    finish_reason: FinishReason
    logp: float | None

    @property
    def text(self) -> str:
        """The content of the message; empty if it is no text, as in a message that only calls tools."""
        content = self.message.get("content")
        return content if isinstance(content, str) else ""


def message_text(message: Message) -> str:
    """Returns what a reader sees of an answer: its text, and its calls as JSON."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = message.get("tool_calls")
    return "\n".join(filter(None, (text, json.dumps(calls, ensure_ascii=False) if calls else "")))


class Unanswered(NamedTuple):
    """An answer that could not be made.

    Attributes:
      prompt_id: of its question.
      sample: its number, from 0, among the answers to the question.
      reason: why, in words under which such answers are counted; it never holds a key or a password.
      again: whether asking again may help, as after a failure of a server.
    """

    prompt_id: str
    sample: int
    reason: str
    again: bool = False
