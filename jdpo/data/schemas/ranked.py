"""What a row asks and how its answers stand, and which pairs of answers are learnt from.

A row of two sides is the case of two answers. `ranked` says which pairs a row of more gives:

    best_vs_worst   the best and the worst: one pair a row
    best_vs_random  the best and one of those behind it, picked by a hash of the row's words: the same in every run
    all             every pair of which one is better: n (n - 1) / 2 pairs of n answers

Answers of the same standing never make a pair. Of several best (or worst) ones, the first in the file counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jdpo.types import Text

Rule = Literal["best_vs_worst", "best_vs_random", "all"]

FEW_ANSWERS = "fewer than two answers"
TIED = "ties: answers of the same rank, score or vote"


class Dropped(NamedTuple):
    """A row (or a pair of its answers) that is not trained on, and why, in words that are counted."""

    reason: str
    origin: str
    detail: str = ""


class Answer(NamedTuple):
    """One answer: plain text, or messages, which may begin with the prompt.

    Attributes:
      text: the answer.
      standing: a higher one is better; it compares answers of one row only.
      score: what a person or model gave it, higher is better; None: not given.
    """

    text: Text
    standing: float
    score: float | None = None


class Asked(NamedTuple):
    """A prompt (empty where the answers hold it) and its answers."""

    prompt: Text
    answers: Sequence[Answer]


Couple = tuple[Answer, Answer]
"""The better answer, and the worse one."""


def couples(asked: Asked, rule: Rule, origin: str) -> list[Couple | Dropped]:
    """The pairs of answers that are learnt from, the better one first; ties are Dropped."""
    answers = asked.answers
    if len(answers) < 2:
        return [Dropped(FEW_ANSWERS, origin)]
    if rule == "all":
        return [_ordered(first, second, origin) for first, second in itertools.combinations(answers, 2)]
    top = best(answers)
    worse = [answer for answer in answers if answer.standing < top.standing]
    if not worse:
        return [Dropped(TIED, origin)]
    if rule == "best_vs_random":
        return [(top, worse[_content_hash(asked) % len(worse)])]
    return [(top, min(worse, key=lambda answer: answer.standing))]


def best(answers: Sequence[Answer]) -> Answer:
    """The first of the highest standing."""
    return max(answers, key=lambda answer: answer.standing)


def margin(better: Answer, worse: Answer) -> float | None:
    """By how much the better one was scored higher; negative where the scores say otherwise, None without scores."""
    return None if better.score is None or worse.score is None else better.score - worse.score


def _ordered(first: Answer, second: Answer, origin: str) -> Couple | Dropped:
    if first.standing == second.standing:
        return Dropped(TIED, origin)
    return (first, second) if first.standing > second.standing else (second, first)


def _content_hash(asked: Asked) -> int:
    """Of the words alone: neither the file's name nor a process's hash seed moves a pick."""
    words = [_words(text) for text in (asked.prompt, *(answer.text for answer in asked.answers))]
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8])


def _words(text: Text) -> str | list[str | None]:
    return text if isinstance(text, str) else [message["content"] for message in text]
