"""The interface of scorers: what they are given, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jdpo.generation.values import Answer, Question
from jdpo.scoring.score_files import Score, Verdict


class Asked(NamedTuple):
    """A question with all its answers, in the order of their samples."""

    question: Question
    answers: list[Answer]


Block = Sequence[Asked]
"""Questions that are scored together."""

BLOCK_ANSWERS = 512
"""About this many answers are scored between two writes. A command that is killed loses at most these."""


class Scored(NamedTuple):
    """The result of a block of questions.

    Attributes:
      scores: one per answer, in their order.
      verdicts: the comparisons that the scores come from; empty for scorers that see one answer at a time.
      counts: what else happened, in a few words, such as requests sent again -> how often; None: nothing.
    """

    scores: list[Score]
    verdicts: list[Verdict]
    counts: dict[str, int] | None = None


class Scorer(Protocol):
    """A way to score answers. It is made for a list of blocks, and then given those that have no scores yet."""

    def describe(self) -> dict[str, Any]:
        """Returns what decides the scores, as JSON: digests, settings. Equal descriptions mean equal scores.

        It is written to files, so it holds no key or password.
        """
        ...

    def score(self, block: Block) -> Scored:
        """Scores all answers of a block.

        Raises:
          ValueError: an answer cannot be scored for a reason that the user must fix; its row is named.
        """
        ...


def grouped(questions: Mapping[str, Question], answers: Iterable[Answer]) -> list[Asked]:
    """Groups answers by question, in the order of the answers; questions without answers are left out.

    Raises:
      ValueError: an answer belongs to no question.
    """
    found: dict[str, Asked] = {}
    for answer in answers:
        if answer.prompt_id not in questions:
            raise ValueError(
                f"answer {answer.sample} belongs to prompt_id {answer.prompt_id}, which is not among the questions; "
                "the folder is damaged: generate the answers again"
            )
        found.setdefault(answer.prompt_id, Asked(questions[answer.prompt_id], [])).answers.append(answer)
    return list(found.values())


def cut(asked: Iterable[Asked], block_answers: int = BLOCK_ANSWERS) -> list[Block]:
    """Cuts questions into blocks; the answers to a question are never apart, since some scorers compare them.

    Args:
      block_answers: a block ends once it has this many answers.
    """
    blocks: list[list[Asked]] = []
    size = block_answers
    for one in asked:
        # Full from the start, so that the first question opens a block.
        if size >= block_answers:
            blocks.append([])
            size = 0
        blocks[-1].append(one)
        size += len(one.answers)
    return [*blocks]
