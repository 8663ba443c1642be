"""The prompts of each round, and those that no round asks: a split that follows from the seed and the prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import DatasetConfig
from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.prompt_rows import prompt_row
from jdpo.data.schemas.schema_table import CANONICAL
from jdpo.durable import write_durably
from jdpo.generation.answer_files import questions_digest
from jdpo.generation.prompts import make_question, read_prompts
from jdpo.generation.values import Question
from jdpo.iteration.loop_settings import LoopSettings
from jdpo.words import figure


class Split(NamedTuple):
    """The prompts of a loop.

    Attributes:
      rounds: the questions of each round; no question is in two of them.
      held_out: questions that no round asks.
      unused: number of questions that are left over.
      removed: number of questions that are not asked because the held-out prompts or pairs have them, too.
      digest: of all questions with their columns, and of their order, used or not.
    """

    rounds: list[list[Question]]
    held_out: list[Question]
    unused: int
    removed: int
    digest: str


def read_split(loop: LoopSettings) -> Split:
    """Reads and splits the prompts of a loop.

    Raises:
      ValueError: there are too few prompts, or they cannot be read.
    """

    def questions_of(path: str) -> list[Question]:
        return read_prompts(DatasetConfig(path=path)).questions

    questions = questions_of(loop.prompts)
    held_out = None if loop.held_out_prompts is None else questions_of(loop.held_out_prompts)
    # Held-out pairs say nothing about prompts that were trained on.
    apart = [] if loop.compare.pairs is None else questions_of(loop.compare.pairs)
    return split_prompts(questions, held_out, loop, apart={one.prompt_id for one in apart})


def split_prompts(
    questions: Sequence[Question],
    held_out: Sequence[Question] | None,
    loop: LoopSettings,
    *,
    apart: Set[str] = frozenset(),
) -> Split:
    """Splits questions into held-out ones and rounds.

    Args:
      questions: all different.
      held_out: None: a fraction of `questions` is held out.
      apart: further questions that no round asks, by prompt_id.

    Raises:
      ValueError: there are too few questions for one per round, or for `prompts_per_round`.
    """
    # By a hash of each question: more questions in the file change the place of a few others only.
    ordered = sorted(questions, key=lambda one: _place(loop.seed, one.prompt_id))
    if held_out is None:
        count = max(1, round(loop.held_out * len(ordered)))
        held_out, ordered = ordered[:count], ordered[count:]
    not_asked = apart | {one.prompt_id for one in held_out}
    rest = [one for one in ordered if one.prompt_id not in not_asked]
    size = loop.prompts_per_round or len(rest) // loop.rounds
    if size == 0 or size * loop.rounds > len(rest):
        fit = figure(len(rest) // (size or 1), "round")
        removed = f", without the {len(ordered) - len(rest):,} that are held out," if len(rest) < len(ordered) else ""
        raise ValueError(
            f"{loop.prompts} has {figure(len(rest), 'prompt')} to ask{removed or ','} which is too few for "
            f"{figure(loop.rounds, 'round')} of {size or 'at least 1'}: no prompt is asked in two rounds. It is enough "
            f"for {fit}; lower rounds or prompts_per_round, or add prompts"
        )
    rounds = [rest[start : start + size] for start in range(0, size * loop.rounds, size)]
    # With their columns, which scorers read.
    digest = questions_digest([*held_out, *rest])
    return Split(rounds, list(held_out), len(rest) - size * loop.rounds, len(ordered) - len(rest), digest)


def _place(seed: int, prompt_id: str) -> str:
    return hashlib.sha256(f"{seed}:{prompt_id}".encode()).hexdigest()


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Writes questions as a prompts file, from which `jdpo generate` reads equal questions.

    Raises:
      ValueError: a question cannot be written so; it names its row.
    """
    write_durably(path, "".join(json.dumps(_row(one), ensure_ascii=False) + "\n" for one in questions))


def _row(question: Question) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": question.prompt}
    if question.tools is not None:
        row["tools"] = question.tools
    if question.template_kwargs is not None:
        row["chat_template_kwargs"] = question.template_kwargs
    columns = question.columns or {}
    # A column that belongs to a schema, such as `messages`, may be read as the prompt.
    for kept in (columns, {name: value for name, value in columns.items() if name not in CANONICAL}):
        found = prompt_row({**kept, **row}, question.origin)
        if isinstance(found, Dropped):
            continue
        again = make_question(found.prompt, found.origin, tools=found.tools, template_kwargs=found.template_kwargs)
        if again.prompt_id == question.prompt_id:
            return {**row, **{name: value for name, value in kept.items() if name not in row}}
    raise ValueError(f"{question.origin}: the prompt cannot be written as a row that reads the same; remove the row")
