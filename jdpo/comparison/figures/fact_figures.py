"""Facts: the probability of the right answer to a question, before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdpo.comparison.compare_document import ComparedFact, Figure, Values
from jdpo.comparison.figures.fallen_pairs import text_of_turns
from jdpo.comparison.intervals import change_of, mcnemar, mean_of, share_of
from jdpo.config import DatasetConfig, public_text
from jdpo.data.schemas.formats import Dropped, Reading
from jdpo.data.schemas.prompt_rows import prompt_row
from jdpo.data.sources import open_source
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.generation.prompts import make_question
from jdpo.generation.values import Question
from jdpo.safe_text import terminal
from jdpo.types import CompletionRow

FELL = 0.05
"""A fact fell if its right answer lost more than this much probability."""

KNOWN = 0.5
"""A fact is known if its right answer has more than this probability: then no other answer is as likely."""


class Fact(NamedTuple):
    """A question with its right answer."""

    question: Question
    answer: str


def read_facts(path: str) -> list[Fact]:
    """Reads rows with a prompt, as `jdpo generate` reads it, and the column `answer`.

    A text under `question` is a user's turn, one under `prompt` is plain text; either may be a list of messages.

    Raises:
      ValueError: there is no row, or a row has no prompt or no answer; it is named.
    """
    found = [_fact(row, origin) for row, origin in open_source(DatasetConfig(path=path)).rows()]
    if not found:
        raise ValueError(f"{public_text(path)}: there is no fact in it")
    return found


def _fact(row: Any, origin: str) -> Fact:
    answer = row.get("answer") if isinstance(row, dict) else None
    if not isinstance(answer, str) or not answer.strip():
        keys = ", ".join(map(terminal, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{origin}: expected a fact with a question (or prompt) and the text answer, found {keys or 'nothing'}"
        )
    # Messages under `question` are read as those under `prompt`.
    is_list = "prompt" not in row and isinstance(row.get("question"), list | dict)
    found = prompt_row(row, origin, Reading({"prompt": "question"} if is_list else None))
    if isinstance(found, Dropped):
        raise ValueError(f"{origin}: the fact has no question: {found.reason}")
    question = make_question(found.prompt, origin, tools=found.tools, template_kwargs=found.template_kwargs)
    return Fact(question, answer)


def facts_digest(facts: Sequence[Fact]) -> str:
    """Returns a digest of the questions and answers, whatever file they are in."""
    return hashlib.sha256(json.dumps([(fact.question.prompt_id, fact.answer) for fact in facts]).encode()).hexdigest()


def completion_rows(facts: Sequence[Fact], tokenizer: Tokenizer) -> list[CompletionRow]:
    """Returns the rows to score; without a chat template a user's turn is plain text, too."""
    rows = []
    for question, answer in facts:
        prompt = question.prompt
        if (
            not isinstance(prompt, str)
            and [turn["role"] for turn in prompt] == ["user"]
            and not tokenizer.has_chat_template
        ):
            prompt = prompt[0]["content"]
        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        rows.append(
            CompletionRow(
                prompt, completion, question.origin, tools=question.tools, template_kwargs=question.template_kwargs
            )
        )
    return rows


def compared_facts(facts: Sequence[Fact], before: np.ndarray, after: np.ndarray) -> list[ComparedFact]:
    """Returns the facts, those that fell most first.

    Args:
      before, after: float [facts], probabilities of the right answers.
    """
    return [
        ComparedFact(
            question=text_of_turns(facts[index].question.prompt),
            answer=facts[index].answer,
            before=float(before[index]),
            after=float(after[index]),
            fell=bool(before[index] - after[index] > FELL),
        )
        for index in np.argsort(after - before, kind="stable").tolist()
    ]


def fact_figures(facts: Sequence[Fact], before: np.ndarray, after: np.ndarray) -> Iterator[Figure]:
    """Yields the figures of facts; arguments as for `compared_facts`."""
    prompts = np.array([fact.question.prompt_id for fact in facts])
    num_prompts, num_rows = len(np.unique(prompts)), len(facts)
    knew, knows = before > KNOWN, after > KNOWN
    probability = Values(
        before=mean_of(before, prompts, at_least=0, at_most=1),
        after=mean_of(after, prompts, at_least=0, at_most=1),
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
        # The test assumes independent rows.
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
        title="Right answer above one half",
        section="facts",
        unit="share",
        better="up",
        all=accuracy,
    )
    yield Figure(
        name="facts.fell",
        title=f"Facts that lost more than {FELL}",
        section="facts",
        unit="share",
        better="down",
        all=fell,
        neutral=None,
    )
