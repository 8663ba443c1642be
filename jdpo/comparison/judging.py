"""Verdicts on the answers of two models to the same prompts, by any scorer of `jdpo score`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.comparison.figures.answer_figures import AnswerPair, length_of
from jdpo.comparison.figures.win_figures import Won
from jdpo.generation.values import Question
from jdpo.scoring.protocol import Asked, cut
from jdpo.scoring.score_blocks import score_answers
from jdpo.scoring.score_files import VERDICTS, Score, Verdict, answers_digest, read_about, read_scores, read_verdicts
from jdpo.scoring.scorers import By, default_name, make_scorer
from jdpo.words import figure

BEFORE, AFTER = 0, 1
"""The sample numbers under which the two answers are scored."""

Log = Callable[[str], None]


def judge_pairs(
    pairs: Sequence[AnswerPair],
    questions: Mapping[str, Question],
    by: By,
    options: Mapping[str, Any],
    folder: Path,
    log: Log,
) -> list[Won]:
    """Returns who won each pair: by verdict where the scorer compares, else by the larger score.

    Args:
      questions: by prompt_id.
      options: of the scorer.
      folder: where scores and verdicts are kept, so that a command that is killed continues.

    Raises:
      ValueError: the scorer cannot be made, or the folder holds the work of another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Each pair is a question of its own, so that a scorer compares these two answers, and not those of one model.
    asked = [_asked(pair, questions[pair.after.prompt_id]) for pair in pairs]
    digest = answers_digest(
        {one.question.prompt_id: one.question for one in asked}, (answer for one in asked for answer in one.answers)
    )
    blocks = cut(asked)
    scorer = make_scorer(by, blocks, dict(options))
    # A name of its own for each scorer, its settings and the answers: another scorer may judge the same answers, and
    # verdicts on answers that have been removed since are not in the way.
    identity = hashlib.sha256(json.dumps([scorer.describe(), digest], sort_keys=True).encode()).hexdigest()
    name = f"{default_name(by)[:60]}-{identity[:8]}"
    log(f"comparing {figure(len(asked), 'answer')} of both models by {by.text}")
    score_answers(folder, name, scorer, blocks, digest=digest)
    if read_about(folder, VERDICTS, name) is None:
        scores = read_scores(folder, name, digest).scores
        return [_won(pair, _by_score(one, scores), ()) for pair, one in zip(pairs, asked, strict=True)]
    verdicts = {verdict.prompt_id: verdict for verdict in read_verdicts(folder, name, digest)}
    return [_by_verdict(pair, verdicts[one.question.prompt_id]) for pair, one in zip(pairs, asked, strict=True)]


def _asked(pair: AnswerPair, question: Question) -> Asked:
    prompt_id = f"{question.prompt_id}-{pair.after.sample}"
    sides = [
        answer._replace(prompt_id=prompt_id, sample=sample)
        for sample, answer in ((BEFORE, pair.before), (AFTER, pair.after))
    ]
    return Asked(question._replace(prompt_id=prompt_id), sides)


def _by_verdict(pair: AnswerPair, verdict: Verdict) -> Won:
    assert (verdict.a, verdict.b) == (BEFORE, AFTER), verdict
    won = {"a": 0.0, "b": 1.0, "tie": 0.5}
    firsts = tuple(one == "first" for one in (verdict.first_ab, verdict.first_ba) if one in ("first", "second"))
    return _won(pair, None if verdict.verdict is None else won[verdict.verdict], firsts)


def _by_score(asked: Asked, scores: Mapping[tuple[str, int], Score]) -> float | None:
    before, after = (scores[asked.question.prompt_id, sample].score for sample in (BEFORE, AFTER))
    return None if before is None or after is None else 0.5 + 0.5 * ((after > before) - (after < before))


def _won(pair: AnswerPair, won: float | None, firsts: tuple[bool, ...]) -> Won:
    longer = length_of(pair.after) - length_of(pair.before)
    return Won(pair.after.prompt_id, pair.after.sample, won, longer, firsts)
