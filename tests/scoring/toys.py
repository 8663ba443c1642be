"""Questions and answers made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jdpo.generation.values import Answer, Question
from jdpo.scoring.protocol import Asked


def question(prompt_id: str = "q0", prompt: Any = "2 + 2 =", **columns: Any) -> Question:
    return Question(prompt_id, prompt, f"prompts.jsonl:{prompt_id}", columns=columns or None)


def answer(
    prompt_id: str = "q0",
    sample: int = 0,
    text: str | None = "4",
    tokens: list[int] | None = None,
    logp: float | None = None,
) -> Answer:
    return Answer(prompt_id, sample, {"role": "assistant", "content": text}, tokens, "stop", logp)


def asked(num_questions: int = 5, num_samples: int = 3) -> list[Asked]:
    """Returns questions "q0", "q1", ... with answers of differing lengths."""
    return [
        Asked(question(f"q{i}", right=i), [answer(f"q{i}", j, "word " * (i + j + 1)) for j in range(num_samples)])
        for i in range(num_questions)
    ]


def answers_of(asked: Sequence[Asked]) -> list[Answer]:
    return [answer for one in asked for answer in one.answers]


def questions_of(asked: Sequence[Asked]) -> dict[str, Question]:
    return {one.question.prompt_id: one.question for one in asked}
