"""Rows of two answers and a vote, which tells row by row which answer is better.

    prompt, response_a, response_b, winner: "model_a"                       Chatbot Arena
    prompt, response_a, response_b, winner_model_a: 1, winner_model_b: 0    Chatbot Arena, in columns of 0 and 1
    conversation_a, conversation_b, winner: "tie"                           whole conversations
    prompt, response_0, response_1, better_response_id: 0                   PKU-SafeRLHF
    context, response1, response2, overall_preference: -2                   HelpSteer

A vote names an answer by its column, or by the letter or number at the end of the column's name. `overall_preference`
and `preference_strength` range from -3 (the first answer is much better) to 3 (the second is). Ties are dropped and
counted as ties, whether both answers are good or bad.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, NamedTuple

from jdpo.data.schemas import messages
from jdpo.data.schemas.conversation_columns import COLUMNS, is_conversation
from jdpo.data.schemas.describing import printable, shown
from jdpo.data.schemas.messages import Raw, read_messages, read_side
from jdpo.data.schemas.ranked import TIED, Answer, Asked, Dropped
from jdpo.data.schemas.schema_readers import number
from jdpo.types import Message, Text

VOTES = (
    "winner",
    "better_response_id",
    "safer_response_id",
    "overall_preference",
    "preference_strength",
    "preference",
    "preferred",
    "choice",
)
"""Columns with a vote. Columns of 0 and 1 whose names start with `winner_` are one vote together."""

_SIGNED = ("overall_preference", "preference_strength")
_STRONGEST = 3
_ONE_HOT = "winner_"

_STEMS = ("response", "answer", "completion", "output", "conversation")
_MARKS = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
_PROMPTS = ("prompt", "instruction", "question", *COLUMNS, "input")

COLUMNS_READ = (
    *_PROMPTS,
    *(f"{stem}_{mark}" for stem in ("response", "conversation") for mark in ("a", "b", "0", "1", "2")),
    *VOTES,
)
"""Columns of this schema, which a column_map may name."""

_SLOT = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant|candidate)?[_ -]?(?P<mark>\w+)")
_TIES = re.compile(r"(?:tie|draw|equal|same|both|neither)(?:[_ ]*\(?both[_ ]*(?:bad|good)\)?|[_ ]*(?:bad|good))?")


class _Two(NamedTuple):
    """The columns of two answers, and the marks at the end of their names."""

    columns: tuple[str, str]
    marks: tuple[str, str]


def is_vote(raw: Raw) -> bool:
    """Returns whether a row, without its nulls, has a question, two answers to it and a vote."""
    two = _answers(raw)
    if two is None or not _vote_columns(raw):
        return False
    return _prompt_column(raw) is not None or all(isinstance(raw[name], list) for name in two.columns)


def all_votes(raw: Raw) -> set[str]:
    """Returns the columns of a row that may be votes. A column_map picks one of them."""
    return {*VOTES, *(name for name in raw if name.startswith(_ONE_HOT))}


def name_of_vote(name: str, column: str) -> str:
    """Returns the name under which a column that column_map calls `name` is read.

    Columns with signed values keep their meaning: mapped to `winner`, `overall_preference` still ranges from -3 to 3.
    """
    return column if name in VOTES and column in _SIGNED else name


def read_vote(raw: Raw, origin: str) -> Asked | Dropped:
    """Reads a row for which `is_vote` is true.

    Raises:
      ValueError: a vote names no answer, or two votes of the row differ.
    """
    two = _answers(raw)
    assert two is not None
    # All votes are read, since rows such as PKU-SafeRLHF's have several that may contradict each other.
    votes = {column: _meaning(raw, column, two, origin) for column in _vote_columns(raw)}
    if len(votes) > 1 and len({*votes.values()}) > 1:
        found = ", ".join(
            f"{column} is for {'neither' if vote is None else two.columns[vote]}" for column, vote in votes.items()
        )
        choices = " or ".join(f"{{{column}: {column}}}" for column in votes if column in VOTES)
        raise ValueError(f"{origin}: the votes of the row differ ({found}); choose one with column_map: {choices}")
    column, better = next(iter(votes.items()))
    if better is None:
        return Dropped(TIED, origin, "" if column.startswith(_ONE_HOT) else f"{column} is {shown(raw[column])}")
    prompt, texts = _asked(raw, two, origin)
    return Asked(prompt, [Answer(text, 1 if place == better else 0) for place, text in enumerate(texts)])


def _answers(raw: Raw) -> _Two | None:
    for stem, gap, marks in itertools.product(_STEMS, ("_", ""), _MARKS):
        first, second = (raw.get(f"{stem}{gap}{mark}") for mark in marks)
        # Both of one type; otherwise one of them is something else, such as a score.
        if isinstance(first, str | list | dict) and isinstance(second, type(first)):
            return _Two((f"{stem}{gap}{marks[0]}", f"{stem}{gap}{marks[1]}"), marks)
    return None


def _prompt_column(raw: Raw) -> str | None:
    values = {name: raw.get(name) for name in _PROMPTS}
    return next((n for n, value in values.items() if isinstance(value, str | dict) or is_conversation(value)), None)


# --- votes


def _vote_columns(raw: Raw) -> list[str]:
    """Returns the vote columns of a row. Columns of 0 and 1 count as one vote, named by the first of them."""
    one_hot = [name for name in raw if name.startswith(_ONE_HOT)]
    return [name for name in VOTES if name in raw] + (one_hot[:1] if len(one_hot) > 1 else [])


def _meaning(raw: Raw, column: str, two: _Two, origin: str) -> int | None:
    """Returns which answer a vote is for, 0 or 1, or None for a tie.

    Raises:
      ValueError: the vote names no answer.
    """
    if column.startswith(_ONE_HOT):
        return _one_hot(raw, two, origin)
    value = raw[column]
    # In other columns a number is the mark of an answer: 1 means response_1.
    strength = number(value) if column in _SIGNED else None
    if strength is not None and abs(strength) <= _STRONGEST:
        # The sign tells the better answer, 0 is a tie; the strength itself is not used.
        return int(strength > 0) if strength else None
    found = _named(_as_text(value), raw, two) if strength is None else None
    if found is not None:
        return None if found == "tie" else int(found == two.marks[1])
    expected = f"{two.columns[0]} or {two.columns[1]}, {two.marks[0]} or {two.marks[1]}, or tie"
    if column in _SIGNED:
        expected = f"a number from -{_STRONGEST} ({two.columns[0]} is much better) to {_STRONGEST}, or {expected}"
    raise ValueError(f"{origin}: {column} is {shown(value)}; expected {expected}")


def _named(text: str, raw: Raw, two: _Two) -> str | None:
    """Returns the mark of the answer that a vote names, "tie", or None if it names neither."""
    if _TIES.fullmatch(text):
        return "tie"
    match = _SLOT.fullmatch(text)
    marks = {mark.lower(): mark for mark in two.marks}
    if match and match["mark"] in marks:
        return marks[match["mark"]]
    # Some files name the winner by its model.
    models = {mark: raw.get(f"model_{mark.lower()}") for mark in two.marks}
    named = [mark for mark, model in models.items() if isinstance(model, str) and model.strip().lower() == text]
    return named[0] if len(named) == 1 else None


def _one_hot(raw: Raw, two: _Two, origin: str) -> int | None:
    """Reads the columns `winner_...`, one of which holds 1."""
    values = {name: raw[name] for name in raw if name.startswith(_ONE_HOT)}
    marked = {name: _as_text(int(value) if isinstance(value, bool) else value) for name, value in values.items()}
    voted = [name for name, mark in marked.items() if mark == "1"]
    means = {name: _named(name.removeprefix(_ONE_HOT).lower(), raw, two) for name in values}
    if {*marked.values()} == {"0"} and {*means.values()} == {*two.marks}:
        return None  # neither answer won, and there is no column for ties
    if len(voted) != 1 or not {*marked.values()} <= {"0", "1"} or None in means.values():
        listed = ", ".join(f"{printable(name)} is {shown(value)}" for name, value in list(values.items())[:6])
        raise ValueError(
            f"{origin}: {listed}; expected 1 in one of winner_model_{two.marks[0]}, winner_model_{two.marks[1]} and "
            "winner_tie, and 0 in the others"
        )
    found = means[voted[0]]
    return None if found == "tie" else int(found == two.marks[1])


def _as_text(value: Any) -> str:
    """Returns a vote as lower-case text, whole numbers without the decimal point of float columns."""
    found = number(value)
    text = str(int(found)) if found is not None and found == int(found) else str(value)
    return text.strip().lower()


# --- answers


def _asked(raw: Raw, two: _Two, origin: str) -> tuple[Text, list[list[Message]]]:
    """Returns the prompt of a row, empty if the answers are whole conversations, and both answers."""
    answers = {column: raw[column] for column in two.columns}
    # Chatbot Arena stores several rounds as lists of questions and of answers.
    questions, first, second = (_rounds(value) for value in (raw.get("prompt"), *answers.values()))
    if questions and first and second:
        rounds = zip(two.columns, (first, second), strict=True)
        return [], [_interleaved(questions, words, column, origin) for column, words in rounds]
    texts = [read_side(answer, column, origin) for column, answer in answers.items()]
    name = _prompt_column(raw)
    if name is None:
        return [], texts
    # As in alpaca rows, the input belongs to the instruction.
    if name == "instruction" and isinstance(raw.get("input"), str) and isinstance(raw[name], str):
        return "\n".join(filter(None, (raw[name], raw["input"]))), texts
    prompt = raw[name]
    return prompt if isinstance(prompt, str) else read_messages(prompt, name, origin), texts


def _rounds(value: Any) -> list[str | None] | None:
    """Returns the texts of several rounds: a list of strings, or JSON text of one, as in Chatbot Arena's tables."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    is_rounds = isinstance(value, list) and all(isinstance(words, str | None) for words in value)
    return value if is_rounds else None


def _interleaved(questions: list[str | None], answers: list[str | None], column: str, origin: str) -> list[Message]:
    if len(questions) != len(answers):
        raise ValueError(
            f"{origin}: prompt has {len(questions)} rounds and {column} {len(answers)}; expected an answer to each"
        )
    turns: list[Message] = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [messages.user(question or ""), messages.assistant(answer or "")]
    return turns
