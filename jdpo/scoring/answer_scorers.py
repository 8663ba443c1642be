"""Scorers that need no further model: a user's function, an exact match, log-probability, length."""

from __future__ import annotations

import importlib
import inspect
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jdpo.file_digests import file_digest
from jdpo.generation.values import Answer, Question
from jdpo.safe_text import terminal
from jdpo.scoring.protocol import Block, Scored
from jdpo.scoring.score_files import Score
from jdpo.types import Text
from jdpo.words import did_you_mean, listed

NO_SCORE = "the rule returned None"
NO_VALUE = "no value in the column"
NO_LOGP = "no log-probability"
NO_TOKENS = "no tokens"

_ENDED = (128 + signal.SIGHUP, 128 + signal.SIGTERM)
"""Exit codes of a command that is ended by a signal, which may arrive while a rule runs."""

Rule = Callable[[Text, str, dict[str, Any]], float | bool | None]
"""A user's function: (prompt, answer, columns) -> score, True or False, or None for no score.

`prompt` is the text or the list of messages that was answered, `answer` the text of the answer, `columns` the other
columns of the prompt's row.
"""


class AnswerScorer(NamedTuple):
    """A scorer that sees one answer at a time.

    Attributes:
      description: see `Scorer.describe`.
      value: returns the score of an answer, or the reason why it has none.
    """

    description: dict[str, Any]
    value: Callable[[Question, Answer], float | str]

    def describe(self) -> dict[str, Any]:
        """Returns what decides the scores."""
        return self.description

    def score(self, block: Block) -> Scored:
        """Scores the answers of a block one after the other."""
        scores = []
        for question, answers in block:
            for answer in answers:
                value = self.value(question, answer)
                at = (answer.prompt_id, answer.sample)
                scores.append(Score(*at, None, value) if isinstance(value, str) else Score(*at, value))
        return Scored(scores, [])


# --- rule:package.module:function


def rule_scorer(argument: str, blocks: Sequence[Block]) -> AnswerScorer:
    """Makes the scorer of `rule:package.module:function`, whose function is a `Rule`.

    Modules in the current folder are found, like those that are installed.

    Raises:
      ValueError: there is no such module or function, or it does not take three arguments.
    """
    module_name, _, name = argument.partition(":")
    if not module_name or not name:
        raise ValueError(f"rule:{terminal(argument)}: expected rule:package.module:function")
    module = _imported(module_name)
    rule = _function(module, name)
    description: dict[str, Any] = {}
    # Another version of the function gives other scores; only its own file is looked at.
    if (file := getattr(module, "__file__", None)) is not None:
        description["module_sha256"] = file_digest(file)

    def value(question: Question, answer: Answer) -> float | str:
        where = f"rule:{argument} on answer {answer.sample} to {question.origin}"
        try:
            found: Any = rule(question.prompt, answer.text, dict(question.columns or {}))
        # A rule that calls sys.exit would end the command without a word.
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code in _ENDED:
                raise
            raise ValueError(
                f"{where}: it raised {type(error).__name__}: {terminal(error)}; return None for an answer that has no "
                "score"
            ) from error
        if found is None:
            return NO_SCORE
        try:
            number = float(found)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: expected a number, True, False or None, found {terminal(repr(found))}"
            ) from None
        if not math.isfinite(number):
            raise ValueError(f"{where}: expected a finite number, found {number}; return None for no score")
        return number

    return AnswerScorer(description, value)


def _imported(name: str) -> ModuleType:
    # As `python -m` does: a console script's own sys.path lacks the current folder.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"rule: module {terminal(name)} needs {error.name}, which is not installed") from error
        raise ValueError(
            f"rule: no module {terminal(name)}: it is neither installed nor in the current folder, {Path.cwd()}"
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"rule: module {terminal(name)} cannot be imported: {type(error).__name__}: {terminal(error)}"
        ) from error


def _function(module: ModuleType, name: str) -> Rule:
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(name, functions) or f"functions there: {listed(functions, 10) or 'none'}"
        raise ValueError(f"rule: {module.__name__} has no function {terminal(name)}; {hint}")
    try:
        inspect.signature(found).bind("prompt", "answer", {})
    except TypeError:
        raise ValueError(
            f"rule: {module.__name__}.{name} must take three arguments, (prompt, answer, columns); found "
            f"{name}{inspect.signature(found)}"
        ) from None
    rule: Rule = found
    return rule


# --- exact:COLUMN


def exact_scorer(argument: str, blocks: Sequence[Block]) -> AnswerScorer:
    """Makes the scorer of `exact:COLUMN`: 1 if the answer equals the column's value, else 0.

    The column has a text, a number, or a list of them, any of which is right. White space around both is ignored, and
    nothing else.

    Raises:
      ValueError: no row has the column; the message names those that rows have.
    """
    names = sorted({name for block in blocks for question, _ in block for name in question.columns or {}})
    if argument not in names:
        hint = did_you_mean(argument, names)
        there = f"columns there: {listed(names, 20)}" if names else "the prompts have no other columns"
        raise ValueError(
            f"exact:{terminal(argument)}: the prompts have no column of that name; "
            f"{terminal(there)}{f'; {hint}' if hint else ''}"
        )

    def value(question: Question, answer: Answer) -> float | str:
        right = (question.columns or {}).get(argument)
        if right is None:
            return NO_VALUE
        accepted = right if isinstance(right, list) else [right]
        if not all(isinstance(one, str | int | float) for one in accepted):
            raise ValueError(
                f"{question.origin}: column {terminal(argument)}: expected a text, a number or a list of them, found "
                f"{type(right).__name__}"
            )
        return float(answer.text.strip() in {str(one).strip() for one in accepted})

    return AnswerScorer({}, value)


# --- what the model itself says


def logp_scorer(argument: str, blocks: Sequence[Block]) -> AnswerScorer:
    """Makes the scorer of `logp`: the answer's summed log-probability under the model that gave it."""
    return AnswerScorer({}, lambda _, answer: NO_LOGP if answer.logp is None else answer.logp)


def logp_per_token_scorer(argument: str, blocks: Sequence[Block]) -> AnswerScorer:
    """Makes the scorer of `logp_per_token`: the mean log-probability of the answer's tokens."""

    def value(question: Question, answer: Answer) -> float | str:
        if answer.logp is None:
            return NO_LOGP
        # More digits would be noise: `logp` is stored with four.
        return round(answer.logp / len(answer.tokens), 6) if answer.tokens else NO_TOKENS

    return AnswerScorer({}, value)


def length_scorer(argument: str, blocks: Sequence[Block]) -> AnswerScorer:
    """Makes the scorer of `length`: tokens of an answer, or characters where any answer comes without its tokens."""
    # One unit for all answers: scores in two units could not be compared.
    in_tokens = all(answer.tokens is not None for block in blocks for _, answers in block for answer in answers)

    def value(question: Question, answer: Answer) -> float:
        return float(len(answer.tokens) if in_tokens and answer.tokens is not None else len(answer.text))

    return AnswerScorer({"unit": "tokens" if in_tokens else "characters"}, value)
