"""Folders with the answers that a test needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.generation.answer_files import read_answers
from jdpo.generation.prompts import Prompts, make_question
from jdpo.generation.values import Answer, FinishReason, Question, Sampling, Unanswered
from jdpo.generation.writing import write_answers
from jdpo.scoring.score_files import Score, answers_digest, write_scores

CUT = "..."
"""An answer that ends so was cut off."""


class Written:
    """Answers each prompt with given texts; a text's tokens are as many as its words."""

    def __init__(self, texts: Mapping[str, Sequence[str | None]], *, tokens: bool) -> None:
        self.texts, self.tokens = texts, tokens

    def describe(self) -> dict[str, Any]:
        return {"model": "written"}

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> list[Answer | Unanswered]:
        return [self._one(question, sample) for question in questions for sample in range(num_samples)]

    def _one(self, question: Question, sample: int) -> Answer | Unanswered:
        text = self.texts[question.prompt_id][sample]
        if text is None:
            return Unanswered(question.prompt_id, sample, "refused")
        reason: FinishReason = "length" if text.endswith(CUT) else "stop"
        tokens = list(range(len(text.split()))) if self.tokens else None
        return Answer(question.prompt_id, sample, {"role": "assistant", "content": text}, tokens, reason, None)


def write_gen(
    folder: Path, texts: Mapping[str, Sequence[str | None]], *, tokens: bool = True, **framed: Any
) -> list[Question]:
    """Writes a folder of answers.

    Args:
      texts: {user's question: its answers}, as many to each; None: the answer could not be made.
      tokens: whether the answers have tokens, unlike those of some servers.
      framed: tools, template_kwargs and columns of all questions.
    """
    questions = [
        make_question([{"role": "user", "content": text}], f"p:{number}", **framed) for number, text in enumerate(texts)
    ]
    by_id = {question.prompt_id: found for question, found in zip(questions, texts.values(), strict=True)}
    (num_samples,) = {len(found) for found in texts.values()}
    prompts = Prompts(questions, "p", len(questions), 0, 0, {}, {})
    source = Written(by_id, tokens=tokens)
    write_answers(folder, prompts, source, sampling=Sampling(), num_samples=num_samples, log=lambda line: None)
    return questions


def write_gen_scores(folder: Path, scores: Sequence[float | None], name: str = "quality") -> None:
    """Writes scores of the answers of a folder, in their order."""
    _, questions, answers = read_answers(folder)
    found = [
        Score(answer.prompt_id, answer.sample, score, None if score is not None else "unreadable")
        for answer, score in zip(answers, scores, strict=True)
    ]
    digest = answers_digest(questions, answers)
    write_scores(folder, name, found, made_by={"by": "a test"}, digest=digest)
