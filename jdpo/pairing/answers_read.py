"""The answers to pair: those of one `gen` folder with their scores, or those of two folders, grouped by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jdpo.generation.answer_files import read_answers
from jdpo.generation.values import Answer, Question, message_text
from jdpo.pairing.candidates import SCORED, Candidate, PairRules, Side
from jdpo.pairing.similarity import words_of
from jdpo.safe_text import terminal
from jdpo.scoring.protocol import Asked, grouped
from jdpo.scoring.score_files import ScoreFile, answers_digest, names_of, read_scores
from jdpo.words import listed

LengthUnit = Literal["tokens", "words", "characters"]


class Source(NamedTuple):
    """A `gen` folder.

    Attributes:
      digest: of its answers, as the scores name it.
      prompt_ids: its questions, answered or not.
      asked: its questions with their answers; those without answers are left out.
    """

    folder: Path
    digest: str
    prompt_ids: frozenset[str]
    asked: list[Asked]


class Group(NamedTuple):
    """A prompt and all answers to it."""

    question: Question
    candidates: list[Candidate]


class Material(NamedTuple):
    """Everything that pairs are made of.

    Attributes:
      sources: the folders: one, or two for `delta`.
      scores: the scores that order the answers; None for strategies that read none.
      unit: unit of the candidates' lengths.
      groups: the prompts, in the order of the first folder, then those that only the second one has.
    """

    sources: list[Source]
    scores: ScoreFile | None
    unit: LengthUnit
    groups: list[Group]


def read_material(
    folders: Sequence[Path], rules: PairRules, *, score: str | None = None, unit: LengthUnit | None = None
) -> Material:
    """Reads answers and scores.

    Args:
      folders: two for `delta`, the stronger model's first; else one.
      score: name of the scores in the folder; None: the only ones there.
      unit: unit of lengths; None: tokens, or words if an answer of a server came without its tokens.

    Raises:
      ValueError: a wrong number of folders, folders without answers, a folder or scores that cannot be read, a score
        for a strategy without scores, or lengths in tokens where an answer has none.
    """
    if len(folders) != (2 if rules.strategy == "delta" else 1):
        wanted = "two folders, the answers of the stronger model first" if rules.strategy == "delta" else "one folder"
        raise ValueError(f"strategy {rules.strategy} takes {wanted}; found {len(folders)}")
    sources = [_read_source(folder) for folder in folders]
    if not any(source.asked for source in sources):
        raise ValueError(f"{', '.join(map(str, folders))}: there are no answers to pair")
    scores = _scores(sources[0], score) if rules.strategy in SCORED else None
    if scores is None and score is not None:
        raise ValueError(f"strategy {rules.strategy} reads no scores; leave --score {terminal(score)} out")
    found_unit = _unit(sources, unit)
    groups: dict[str, Group] = {}
    sides: tuple[Side, ...] = (0, 1)
    for side, source in zip(sides, sources, strict=False):
        for asked in source.asked:
            group = groups.setdefault(asked.question.prompt_id, Group(asked.question, []))
            group.candidates.extend(_candidate(answer, side, found_unit, scores) for answer in asked.answers)
    return Material(sources, scores, found_unit, list(groups.values()))


def _read_source(folder: Path) -> Source:
    _, questions, found = read_answers(folder)
    answers = list(found)
    return Source(folder, answers_digest(questions, answers), frozenset(questions), grouped(questions, answers))


def _scores(source: Source, name: str | None) -> ScoreFile:
    if name is None:
        names = names_of(source.folder)
        if len(names) != 1:
            there = (
                f"there are several: {listed(names, 10)}; choose one with --score" if names else "there are none yet"
            )
            raise ValueError(
                f"{source.folder}: this strategy orders answers by their scores, and {there}. "
                f"`jdpo score {source.folder} --by SCORER` writes scores"
            )
        name = names[0]
    return read_scores(source.folder, name, source.digest)


def _unit(sources: Sequence[Source], unit: LengthUnit | None) -> LengthUnit:
    answers = [answer for source in sources for asked in source.asked for answer in asked.answers]
    without = next((answer for answer in answers if answer.tokens is None), None)
    if unit is None:
        return "tokens" if without is None else "words"
    if unit == "tokens" and without is not None:
        raise ValueError(
            f"answer {without.sample} to prompt {without.prompt_id} came from a server without its tokens; give "
            "--length_unit words or characters"
        )
    return unit


def _candidate(answer: Answer, side: Side, unit: LengthUnit, scores: ScoreFile | None) -> Candidate:
    text = message_text(answer.message)
    if unit == "tokens":
        assert answer.tokens is not None
        length = len(answer.tokens)
    else:
        length = len(words_of(text)) if unit == "words" else len(text)
    score = None
    # Scores are complete for the answers of their digest, so a missing one is a damaged file.
    if scores is not None:
        score = scores.scores[answer.prompt_id, answer.sample].score
    return Candidate(side, answer.sample, text, length, answer.finish_reason == "length", score, answer.message)
