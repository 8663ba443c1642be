"""Outcomes of pairs of answers: judges on a local server, and scorers of `jdpo score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.comparison.figures.answer_figures import AnswerPair
from jdpo.comparison.figures.win_figures import WinRates, win_rates
from jdpo.comparison.judging import judge_pairs
from jdpo.generation.prompts import make_question
from jdpo.generation.values import Answer
from jdpo.scoring.scorers import parse_by
from tests.chat_server import prefers_first, prefers_long, serving_chat

FAST: dict[str, Any] = {"retries": 0, "timeout": 60.0}


def answered(num_prompts: int = 24) -> tuple[list[AnswerPair], dict[str, Any]]:
    """Answers of which those after are longer in two of three prompts."""
    lengths = np.random.default_rng(0).integers(2, 30, (num_prompts, 2))
    lengths[::3] = lengths[::3, ::-1]
    questions = [make_question(f"Question {number}?", "prompts.jsonl:1") for number in range(num_prompts)]
    pairs = []
    for question, (short, long) in zip(questions, np.sort(lengths, axis=1).tolist(), strict=True):
        sides = (short, long) if len(pairs) % 3 else (long, short)
        pairs.append(
            AnswerPair(
                *(
                    Answer(question.prompt_id, 0, {"role": "assistant", "content": "word " * size}, None, "stop", None)
                    for size in sides
                )
            )
        )
    return pairs, {question.prompt_id: question for question in questions}


def rates(by: str, folder: Path, options: Mapping[str, Any] = FAST) -> WinRates:
    pairs, questions = answered()
    return win_rates(judge_pairs(pairs, questions, parse_by(by), options, folder, lambda line: None))


def test_a_judge_that_says_first_gives_one_half(tmp_path: Path) -> None:
    with serving_chat(prefers_first) as server:
        found = {figure.name: figure for figure in rates(f"judge:{server.url}", tmp_path).figures}
    assert found["win_rate"].all.after.value == found["win_rate.length_controlled"].all.after.value == 0.5
    assert found["win_rate"].finding == "unclear"
    assert found["win_rate.first_shown"].all.after.value == 1
    assert found["win_rate.first_shown"].all.num_rows == 48


def test_length_control_removes_what_a_judge_of_length_sees(tmp_path: Path) -> None:
    with serving_chat(prefers_long) as server:
        found = {figure.name: figure for figure in rates(f"judge:{server.url}", tmp_path).figures}
    assert found["win_rate"].all.after.value == pytest.approx(2 / 3)
    assert found["win_rate.length_controlled"].finding == "unclear"
    assert found["win_rate.first_shown"].all.after.value == 0.5


def test_rubbish_is_counted_and_left_out(tmp_path: Path) -> None:
    with serving_chat("I like both.") as server:
        found = rates(f"judge:{server.url}", tmp_path)
    assert not found.figures
    assert "24 of 24" in found.warnings[0]


def test_scores_decide_and_another_scorer_may_follow(tmp_path: Path) -> None:
    by_length = rates("length", tmp_path, {})
    assert by_length.figures[0].all.after.value == pytest.approx(2 / 3)
    assert rates("length", tmp_path, {}) == by_length  # from the files
    assert len([*(tmp_path / "scores").glob("*.jsonl")]) == 1
    pairs, questions = answered()
    swapped = [AnswerPair(pair.after, pair.before) for pair in pairs]  # as of models that were trained again
    outcomes = judge_pairs(swapped, questions, parse_by("length"), {}, tmp_path, lambda line: None)
    assert win_rates(outcomes).figures[0].all.after.value == pytest.approx(1 / 3)
    with serving_chat(prefers_first) as server:
        assert rates(f"judge:{server.url}", tmp_path).figures[0].all.after.value == 0.5
