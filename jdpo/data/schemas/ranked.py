"""Ranked answers, and the pairs of answers that are learnt.

A row with two sides is a row with two answers. For rows with more answers, `ranked` chooses the pairs:

    best_vs_worst   the best and the worst answer: one pair per row
    best_vs_random  the best answer and a worse one, picked by a hash of the row's text: the same in every run
    all             every pair of answers of which one is better: n (n - 1) / 2 pairs of n answers

Answers of the same standing never make a pair. Of several best (or worst) answers, the first in the file is taken.
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
    """A row, or a pair of its answers, that is not trained on.

    Attributes:
      reason: the name under which it is counted.
      origin: where it came from.
      detail: more about this row, for its message.
    """

    reason: str
    origin: str
    detail: str = ""


class Answer(NamedTuple):
    """An answer: plain text, or messages, which may start with the prompt.

    Attributes:
      text: the answer.
      standing: orders the answers of one row; higher is better.
      score: the score that a person or model gave, higher is better; None: not scored.
    """

    text: Text
    standing: float
    score: float | None = None


class Asked(NamedTuple):
    """A prompt and its answers. The prompt is empty if the answers contain it."""

    prompt: Text
    answers: Sequence[Answer]


Couple = tuple[Answer, Answer]
"""The better answer and the worse answer of a pair."""


def couples(asked: Asked, rule: Rule, origin: str) -> list[Couple | Dropped]:
    """Returns the pairs of answers that `rule` chooses, the better answer first; ties are Dropped."""
    answers = asked.answers
    if len(answers) < 2:
        return [Dropped(FEW_ANSWERS, origin)]
    if rule == "all":
        return [_ordered(first, second, origin) for first, second in itertools.combinations(answers, 2)]
    top = best(answers)
    # Answers that tie with the best are no worse, so they are not rejected.
    worse = [answer for answer in answers if answer.standing < top.standing]
    if not worse:
        return [Dropped(TIED, origin)]
    if rule == "best_vs_random":
        # A hash, not a random generator: the pick must not depend on the order of rows or the number of processes.
        return [(top, worse[_content_hash(asked) % len(worse)])]
    return [(top, min(worse, key=lambda answer: answer.standing))]


def best(answers: Sequence[Answer]) -> Answer:
    """Returns the answer with the highest standing, the first of several."""
    return max(answers, key=lambda answer: answer.standing)


def margin(better: Answer, worse: Answer) -> float | None:
    """Returns the score of the better answer minus that of the worse; None without scores.

    It is negative if the scores contradict the standing.
    """
    return None if better.score is None or worse.score is None else better.score - worse.score


def _ordered(first: Answer, second: Answer, origin: str) -> Couple | Dropped:
    if first.standing == second.standing:
        return Dropped(TIED, origin)
    return (first, second) if first.standing > second.standing else (second, first)


def _content_hash(asked: Asked) -> int:
    """Hashes the text of a row, so that a pick depends neither on the file's name nor on the process's hash seed."""
    words = [_words(text) for text in (asked.prompt, *(answer.text for answer in asked.answers))]
    # 8 bytes are enough to pick evenly among a few answers.
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8])


def _words(text: Text) -> str | list[str | None]:
    # Only contents, so that ids and times in messages do not change the pick.
    return text if isinstance(text, str) else [message["content"] for message in text]
