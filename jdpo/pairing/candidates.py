"""Answers as pairing sees them, the rules for pairs, and the reasons for which an answer or a pair is dropped."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple, get_args

from jdpo.types import Message

Strategy = Literal["best_worst", "best_random", "adjacent", "delta", "human"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

SCORED: tuple[Strategy, ...] = ("best_worst", "best_random", "adjacent")
"""Strategies that order answers by a score."""

EMPTY = "empty"
SAME_TEXT = "same text as another answer"
ALIKE = "nearly the same as another answer (dedupe)"
NO_SCORE = "no score"
ONE_FOLDER = "prompt is in one of the two folders only"
ALONE = "no other answer to compare with"
NOT_PICKED = "not picked by the strategy"
CUT_OFF = "cut off, so it may not be chosen"
TIED = "tie"
BELOW_MARGIN = "margin below min_margin"
SIDES_ALIKE = "chosen and rejected are the same or nearly the same"
LENGTH_GAP = "lengths differ by more than max_length_gap"
ENOUGH = "max_per_prompt reached"
SKIPPED = "skipped by the person"
UNDECIDED = "not shown to the person yet"

Side = Literal[0, 1]
"""The folder of an answer: 0, and 1 for the second folder of `delta`."""

Name = tuple[Side, int]
"""The name of an answer among those to one prompt: its folder and its sample number."""


class Candidate(NamedTuple):
    """An answer that may become a side of a pair.

    Attributes:
      side: its folder.
      sample: its number among the answers to the prompt.
      text: the content of its message, and its calls as JSON.
      length: its length in the unit of `max_length_gap`.
      cut_off: whether it ends because of `max_new_tokens`.
      score: higher is better; None: the scorer has none, or none is asked for.
      message: its message, with what is not in its text, such as the thought before it; None: the text is all of it.
    """

    side: Side
    sample: int
    text: str
    length: int
    cut_off: bool
    score: float | None
    message: Message | None = None

    @property
    def name(self) -> Name:
        return (self.side, self.sample)


Proposal = tuple[Candidate, Candidate]
"""The better answer and the worse answer of a pair; for `human`, two answers that nobody has ordered yet."""


@dataclass(frozen=True, kw_only=True)
class PairRules:
    """The rules by which answers to a prompt become pairs.

    Attributes:
      strategy: which answers are compared; see `jdpo.pairing.strategies`.
      min_margin: least difference of the scores. Equal scores never make a pair.
      max_length_gap: largest difference of the lengths; None: any.
      max_per_prompt: most pairs of one prompt; None: 1 for best_worst and best_random, all for the others.
      dedupe: answers at least this similar count as one; None: only equal texts do.
      allow_cut_off: whether an answer that was cut off may be chosen; it may always be rejected.
      seed: of the picks of best_random and of the order in which `human` shows answers.

    Raises:
      ValueError: a value is out of range, or the strategy does not use it.
    """

    strategy: Strategy = "best_worst"
    min_margin: float | None = None
    max_length_gap: int | None = None
    max_per_prompt: int | None = None
    dedupe: float | None = None
    allow_cut_off: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, found {self.strategy!r}")
        if self.min_margin is not None:
            if self.strategy not in SCORED:
                raise ValueError(f"min_margin: strategy {self.strategy} reads no scores; leave min_margin out")
            if not 0 <= self.min_margin < math.inf:
                raise ValueError(f"min_margin: expected a number from 0, found {self.min_margin}")
        if self.max_length_gap is not None and self.max_length_gap < 0:
            raise ValueError(f"max_length_gap: expected 0 or more, found {self.max_length_gap}")
        if self.max_per_prompt is not None and self.max_per_prompt < 1:
            raise ValueError(f"max_per_prompt: expected 1 or more, found {self.max_per_prompt}")
        # Not `<= 0`, so that NaN is refused as well.
        if self.dedupe is not None and not 0 < self.dedupe <= 1:
            raise ValueError(f"dedupe: expected a similarity above 0 and at most 1, found {self.dedupe}")

    @property
    def most_pairs(self) -> int | None:
        """The most pairs of one prompt; None: all."""
        if self.max_per_prompt is not None:
            return self.max_per_prompt
        return 1 if self.strategy in ("best_worst", "best_random") else None

    def is_reached(self, num_pairs: int) -> bool:
        """Returns whether a prompt with this many pairs has as many as it may have."""
        return self.most_pairs is not None and num_pairs >= self.most_pairs


def margin_of(better: Candidate, worse: Candidate) -> Decimal | None:
    """Returns the difference of the scores; None if an answer has no score.

    It is exact in decimal, as scores are written: 0.3 - 0.2 is 0.1 and passes a min_margin of 0.1.
    """
    if better.score is None or worse.score is None:
        return None
    return Decimal(repr(better.score)) - Decimal(repr(worse.score))


def draw(seed: int, prompt_id: str, *parts: object) -> str:
    """Returns a random-looking key that follows from its arguments, to order or to pick by.

    A hash and not a random generator: the pick for one prompt does not depend on other prompts, nor on their order.
    """
    return hashlib.sha256(":".join(map(str, (seed, prompt_id, *parts))).encode()).hexdigest()
