"""Figures on the answers that two models give to the same prompts."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jdpo.comparison.compare_document import Better, Figure, Unit, Values
from jdpo.comparison.intervals import change_of, mean_of, share_of
from jdpo.generation.values import Answer, message_text

MOST_SCRIPTS = 8
REPEATED_RUN = 4
"""Repetition counts runs of this many tokens."""


class AnswerPair(NamedTuple):
    """The answers of two models to one prompt, with the same number among the samples."""

    before: Answer
    after: Answer


def length_of(answer: Answer) -> int:
    """Returns the tokens of an answer, or its characters if a server did not return tokens."""
    return len(answer.text) if answer.tokens is None else len(answer.tokens)


def is_empty(answer: Answer) -> bool:
    """Returns True if an answer has neither text nor calls; one that is cut off within its thought has none."""
    return not message_text(answer.message).strip()


def repetition(answer: Answer) -> float:
    """Returns the share of runs of four tokens (or words) that occurred before in the answer; 0 if there are none."""
    items: Sequence[object] = answer.text.split() if answer.tokens is None else answer.tokens
    # Runs of one or two tokens repeat in any text.
    runs = [tuple(items[start : start + REPEATED_RUN]) for start in range(len(items) - REPEATED_RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script_shares(text: str) -> dict[str, float]:
    """Returns the share of a text's letters in each script, by the first word of their Unicode names.

    >>> script_shares("Да, yes")
    {'Cyrillic': 0.4, 'Latin': 0.6}
    """
    scripts = Counter(
        unicodedata.name(letter, "unnamed").split()[0].split("-")[0] for letter in text if letter.isalpha()
    )
    total = sum(scripts.values())
    return {name if name == "CJK" else name.capitalize(): count / total for name, count in scripts.items()}


def answer_figures(pairs: Sequence[AnswerPair]) -> Iterator[Figure]:
    """Yields lengths, cut-offs, repetition and scripts of the answers."""
    # One unit for both models, since their lengths are compared.
    counted = all(answer.tokens is not None for pair in pairs for answer in pair)
    unit: Unit = "tokens" if counted else "characters"
    yield _figure("answers.length", "Length of an answer", unit, "neither", pairs, length_of)
    yield _share("answers.cut_off", "Answers cut off", "down", pairs, lambda answer: answer.finish_reason == "length")
    yield _share("answers.empty", "Empty answers", "down", pairs, is_empty)
    yield _figure("answers.repetition", "Repeated runs of four tokens", "share", "down", pairs, repetition)
    # Once for each answer: every script below is a figure of its own.
    shares = {id(answer): script_shares(answer.text) for pair in pairs for answer in pair}
    totals = Counter[str]()
    for of_answer in shares.values():
        totals.update(of_answer)
    for script, _ in totals.most_common(MOST_SCRIPTS):
        title, name = f"Letters of script {script}", f"answers.script.{script}"
        found = {key: of_answer.get(script, 0.0) for key, of_answer in shares.items()}
        yield _figure(name, title, "share", "neither", pairs, partial(_looked_up, found))


def prompts_of(pairs: Sequence[AnswerPair]) -> np.ndarray:
    """Returns the prompt of each pair of answers."""
    return np.array([pair.after.prompt_id for pair in pairs])


def _figure(
    name: str, title: str, unit: Unit, better: Better, pairs: Sequence[AnswerPair], measure: Callable[[Answer], float]
) -> Figure:
    prompts = prompts_of(pairs)
    before, after = _measured(pairs, measure)
    # Lengths are at least 0, and shares at most 1.
    most = 1.0 if unit == "share" else math.inf
    values = Values(
        before=mean_of(before, prompts, at_least=0, at_most=most),
        after=mean_of(after, prompts, at_least=0, at_most=most),
        difference=mean_of(after - before, prompts),
        num_prompts=len(set(prompts.tolist())),
        num_rows=len(pairs),
    )
    return Figure(name=name, title=title, section="answers", unit=unit, better=better, all=values)


def _share(
    name: str, title: str, better: Better, pairs: Sequence[AnswerPair], measure: Callable[[Answer], bool]
) -> Figure:
    prompts = prompts_of(pairs)
    before, after = _measured(pairs, measure)
    values = Values(
        before=share_of(before, prompts),
        after=share_of(after, prompts),
        difference=change_of(before, after, prompts),
        num_prompts=len(set(prompts.tolist())),
        num_rows=len(pairs),
    )
    return Figure(name=name, title=title, section="answers", unit="share", better=better, all=values)


def _looked_up(values: dict[int, float], answer: Answer) -> float:
    return values[id(answer)]


def _measured(pairs: Sequence[AnswerPair], measure: Callable[[Answer], float]) -> tuple[np.ndarray, np.ndarray]:
    before, after = (np.array([measure(answer) for answer in side], float) for side in zip(*pairs, strict=True))
    return before, after
