"""The scorer `judge:URL`: an answer's score is the share of its comparisons that it wins."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.scoring.judge import Duel, Judge
from jdpo.scoring.protocol import Block, Scored
from jdpo.scoring.score_files import Score, Verdict

COMPARISONS = 16
"""Default of the comparisons per prompt: all of up to 6 answers, and each of 8 answers with 4 others."""

NOT_COMPARED = "not compared"


class JudgeScorer:
    """Compares the answers to each question with one another."""

    def __init__(self, judge: Judge, *, comparisons: int = COMPARISONS, seed: int = 0) -> None:
        """
        Args:
          comparisons: largest number of comparisons per question.
          seed: of the choice among more comparisons than that.

        Raises:
          ValueError: comparisons is below 1.
        """
        if comparisons < 1:
            raise ValueError(f"--comparisons: expected 1 or more per prompt, found {comparisons}")
        self._judge, self._comparisons, self._seed = judge, comparisons, seed

    def describe(self) -> dict[str, Any]:
        """Returns what decides the scores."""
        return {**self._judge.describe(), "comparisons": self._comparisons, "seed": self._seed}

    def score(self, block: Block) -> Scored:
        """Judges the answers to all questions of a block at once, and scores them."""
        chosen = [
            (one, pair)
            for one in block
            for pair in chosen_pairs(len(one.answers), self._comparisons, f"{self._seed} {one.question.prompt_id}")
        ]
        before = self._judge.counts.copy()
        judged = self._judge.compare(
            [Duel(one.question, one.answers[a].message, one.answers[b].message) for one, (a, b) in chosen]
        )
        verdicts = [
            Verdict(one.question.prompt_id, one.answers[a].sample, one.answers[b].sample, *found[:3])
            for (one, (a, b)), found in zip(chosen, judged, strict=True)
        ]
        reasons = {
            (verdict.prompt_id, sample): found.reason
            for verdict, found in zip(verdicts, judged, strict=True)
            for sample in (verdict.a, verdict.b)
            if found.reason is not None
        }
        shares = win_shares(verdicts)
        scores = []
        for answer in (answer for one in block for answer in one.answers):
            at = (answer.prompt_id, answer.sample)
            share = shares.get(at)
            scores.append(Score(*at, share, None if share is not None else reasons.get(at, NOT_COMPARED)))
        return Scored(scores, verdicts, dict(self._judge.counts - before))


def judge_scorer(
    argument: str,
    blocks: Sequence[Block],
    *,
    rubric: str | None = None,
    comparisons: int = COMPARISONS,
    seed: int = 0,
    **server: Any,
) -> JudgeScorer:
    """Makes the scorer of `judge:URL`.

    Args:
      argument: the server's address.
      blocks: not read; verdicts depend on one question at a time.
      rubric, comparisons, seed: see `Judge` and `JudgeScorer`.
      server: the other values of `ServerSettings`; judge_model is its model.

    Raises:
      ValueError, ConnectionError: see `Judge`.
    """
    model = server.pop("judge_model", None)
    judge = Judge(ServerSettings(url=argument, model=model, **server), Path(rubric) if rubric is not None else None)
    return JudgeScorer(judge, comparisons=comparisons, seed=seed)


def chosen_pairs(num_answers: int, most: int, seed: str) -> list[tuple[int, int]]:
    """Returns which answers are compared: all pairs, or `most` of them, in which the answers come about equally often.

    >>> chosen_pairs(3, 16, "any")
    [(0, 1), (0, 2), (1, 2)]
    >>> pairs = chosen_pairs(8, 16, "any")
    >>> {answer: sum(answer in pair for pair in pairs) for answer in range(8)} == dict.fromkeys(range(8), 4)
    True
    """
    every = list(itertools.combinations(range(num_answers), 2))
    if len(every) <= most:
        return every
    order = list(range(num_answers))
    random.Random(hashlib.sha256(seed.encode()).digest()).shuffle(order)
    # The answers in a random circle: each with its neighbour, then each with the next but one, and so on. Every round
    # compares every answer twice.
    rounds = (
        (order[at], order[(at + distance) % num_answers])
        for distance in range(1, num_answers // 2 + 1)
        for at in range(num_answers)
    )
    # The last round of an even number of answers meets each pair twice.
    pairs = dict.fromkeys((min(pair), max(pair)) for pair in rounds)
    return sorted(list(pairs)[:most])


def win_shares(verdicts: Sequence[Verdict]) -> dict[tuple[str, int], float]:
    """Returns {(prompt_id, sample): share of decided comparisons won}, where a tie is half won.

    Answers without a decided comparison are left out.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for verdict in verdicts:
        if verdict.verdict is not None:
            won = {"a": 1.0, "b": 0.0, "tie": 0.5}[verdict.verdict]
            found.setdefault((verdict.prompt_id, verdict.a), []).append(won)
            found.setdefault((verdict.prompt_id, verdict.b), []).append(1 - won)
    return {at: sum(values) / len(values) for at, values in found.items()}
