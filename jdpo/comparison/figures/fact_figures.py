"""Facts: the probability of the right answer to a question, before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdpo.comparison.compare_document import ComparedFact, Figure, Values
from jdpo.comparison.intervals import change_of, mcnemar, mean_of, share_of
from jdpo.config import DatasetConfig, public_text
from jdpo.data.sources import open_source
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal
from jdpo.types import CompletionRow

FELL = 0.05
"""A fact fell if its right answer lost more than this much probability."""

KNOWN = 0.5
"""A fact is known if its right answer has more than this probability: then no other answer is as likely."""


class Fact(NamedTuple):
    """A question with its right answer, and its file and row."""

    question: str
    answer: str
    origin: str
    is_plain: bool


def read_facts(path: str) -> list[Fact]:
    """Reads rows {question, answer} or {prompt, answer}; a question is a user's turn, a prompt is plain text.

    Raises:
      ValueError: there is no row, or a row lacks one of them; it is named.
    """
    found = []
    for row, origin in open_source(DatasetConfig(path=path)).rows():
        asked = [key for key in ("question", "prompt") if isinstance(row, dict) and isinstance(row.get(key), str)]
        answer = row.get("answer") if isinstance(row, dict) else None
        if len(asked) != 1 or not isinstance(answer, str) or not answer.strip():
            keys = ", ".join(map(terminal, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{origin}: expected a fact with the texts question (or prompt) and answer, found {keys or 'nothing'}"
            )
        found.append(Fact(row[asked[0]], answer, origin, asked[0] == "prompt"))
    if not found:
        raise ValueError(f"{public_text(path)}: there is no fact in it")
    return found


def facts_digest(facts: Sequence[Fact]) -> str:
    """Returns a digest of the questions and answers, whatever file they are in."""
    return hashlib.sha256(json.dumps([fact._replace(origin="") for fact in facts]).encode()).hexdigest()


def completion_rows(facts: Sequence[Fact], tokenizer: Tokenizer) -> list[CompletionRow]:
    """Returns the rows to score; without a chat template questions are plain text, too."""
    rows = []
    for question, answer, origin, is_plain in facts:
        if is_plain or not tokenizer.has_chat_template:
            rows.append(CompletionRow(question, answer, origin))
        else:
            turns = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
            rows.append(CompletionRow(*turns, origin))
    return rows


def compared_facts(facts: Sequence[Fact], before: np.ndarray, after: np.ndarray) -> list[ComparedFact]:
    """Returns the facts, those that fell most first.

    Args:
      before, after: float [facts], probabilities of the right answers.
    """
    return [
        ComparedFact(
            question=facts[index].question,
            answer=facts[index].answer,
            before=float(before[index]),
            after=float(after[index]),
            fell=bool(before[index] - after[index] > FELL),
        )
        for index in np.argsort(after - before, kind="stable").tolist()
    ]


def fact_figures(facts: Sequence[Fact], before: np.ndarray, after: np.ndarray) -> Iterator[Figure]:
    """Yields the figures of facts; arguments as for `compared_facts`."""
    prompts = np.array([fact.question for fact in facts])
    num_prompts, num_rows = len(np.unique(prompts)), len(facts)
    knew, knows = before > KNOWN, after > KNOWN
    probability = Values(
        before=mean_of(before, prompts),
        after=mean_of(after, prompts),
        difference=mean_of(after - before, prompts),
        num_prompts=num_prompts,
        num_rows=num_rows,
    )
    accuracy = Values(
        before=share_of(knew, prompts),
        after=share_of(knows, prompts),
        difference=change_of(knew, knows, prompts),
        num_prompts=num_prompts,
        num_rows=num_rows,
        p_value=mcnemar(knew, knows) if num_prompts == num_rows else None,
    )
    fell = Values(after=share_of(before - after > FELL, prompts), num_prompts=num_prompts, num_rows=num_rows)
    yield Figure(
        name="facts.probability",
        title="Probability of the right answer",
        section="facts",
        unit="share",
        better="up",
        all=probability,
    )
    yield Figure(
        name="facts.accuracy",
        title="Right answers with a probability above one half",
        section="facts",
        unit="share",
        better="up",
        all=accuracy,
    )
    yield Figure(
        name="facts.fell",
        title=f"Facts whose right answer lost more than {FELL}",
        section="facts",
        unit="share",
        better="down",
        all=fell,
        neutral=None,
    )
