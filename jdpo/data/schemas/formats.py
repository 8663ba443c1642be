"""Reading raw rows of any known schema into one form.

The schema of a row is the first in `jdpo.data.schemas.schema_table` that fits its columns and the types of their
values. Null columns count as absent; columns that no schema names are ignored. A `column_map` is applied first: it
gives columns of the file jdpo's names, and then only schemas that read all of these names are tried.

Conversations are cut between messages, never within one: the prompt is every message before the final assistant turn.
`jdpo.data.schemas.row_building` makes rows of a prompt and its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from jdpo.config import DatasetConfig
from jdpo.data.schemas import conversation_columns, messages, ranked, votes
from jdpo.data.schemas.describing import named, shown
from jdpo.data.schemas.messages import Raw
from jdpo.data.schemas.objects_of_lists import as_list
from jdpo.data.schemas.ranked import FEW_ANSWERS, TIED, Couple, Dropped
from jdpo.data.schemas.refusal import ColumnsError, Sample, refusal
from jdpo.data.schemas.row_building import (
    EMPTY_SIDE,
    HISTORIES_DIFFER,
    NO_ASSISTANT_TURN,
    NO_SHARED_TURN,
    PROMPT_ELSEWHERE,
    STARTS_WITH_ANSWER,
    SYSTEM_ELSEWHERE,
    answer_row,
    pair_row,
    read_frame,
    whole_pair,
)
from jdpo.data.schemas.schema_readers import SCORES, SIDE_SCORES, UNWANTED, number
from jdpo.data.schemas.schema_table import (
    CANONICAL,
    COMPLETION_SCHEMAS,
    EXTRAS,
    PREFERENCE_SCHEMAS,
    PROMPT_SCHEMAS,
    Schema,
)
from jdpo.data.schemas.turn_marks import spread_mask
from jdpo.types import CompletionRow, PreferenceRow
from jdpo.words import did_you_mean

__all__ = [
    "BELOW_MARGIN",
    "CONTRADICTED",
    "DEVELOPER",
    "EMPTY_SIDE",
    "FEW_ANSWERS",
    "HISTORIES_DIFFER",
    "NO_ASSISTANT_TURN",
    "NO_SHARED_TURN",
    "PROMPT_ELSEWHERE",
    "STARTS_WITH_ANSWER",
    "SYSTEM_ELSEWHERE",
    "TIED",
    "UNWANTED",
    "Dropped",
    "Reading",
    "check_prompts",
    "check_rows",
    "columns_of",
    "completion_rows",
    "detect",
    "find",
    "is_preference",
    "is_ranked",
    "preference_rows",
    "reading_of",
    "schema_name",
]

CONTRADICTED = "scores say that the rejected side is better"
BELOW_MARGIN = "scores closer than min_margin"


DEVELOPER = "with a turn of the role developer, which is written as system"

R = TypeVar("R", PreferenceRow, CompletionRow)


class Reading(NamedTuple):
    """The settings that decide how the rows of a dataset are read.

    Attributes:
      column_map: {jdpo's name of a column: its name in the file}; None: the names are the same.
      ranked: the rule for pairs of several answers; see `jdpo.data.schemas.ranked`.
      min_margin: pairs whose scores are closer are dropped; None: no pair is dropped for its scores.
      every_turn: allow the sides of a pair to differ in more than their final assistant turn.
    """

    column_map: Mapping[str, str] | None = None
    ranked: ranked.Rule = "best_vs_worst"
    min_margin: float | None = None
    every_turn: bool = False


AS_FOUND = Reading()
"""Columns under their names in the file, and no pair dropped for its scores."""


def reading_of(dataset: DatasetConfig, *, every_turn: bool = False) -> Reading:
    """Returns the reading that a dataset's settings ask for."""
    return Reading(dataset.column_map, dataset.ranked, dataset.min_margin, every_turn)


def preference_rows(raw: Raw, origin: str, reading: Reading = AS_FOUND) -> list[PreferenceRow | Dropped]:
    """Reads a raw row of any known preference schema.

    Args:
      raw: {column: value}.
      origin: where the row came from, for messages.
      reading: how to read the rows of the dataset.

    Returns:
      The row's pairs: one, or several if `ranked` is "all". The three parts of a pair are all strings or all lists of
      messages. Dropped takes the place of a pair that cannot be learnt, or of the whole row.

    Raises:
      ValueError: no schema fits the columns, a role is unknown, a content is not text, column_map names a missing
        column, or min_margin is set and the row has no scores. The message names the row.
    """
    try:
        columns, schema = detect(raw, PREFERENCE_SCHEMAS, reading, origin)
        asked = schema.read(columns, origin)
        if isinstance(asked, Dropped):
            return [asked]
        frame = read_frame(columns, origin)
        pairs = [
            # Pairs are dropped one by one: with `ranked: all`, a row may have close pairs and clear ones.
            pair if isinstance(pair, Dropped) else _too_close(pair, reading, columns, origin) or pair
            for pair in ranked.couples(asked, reading.ranked, origin)
        ]
        made = partial(pair_row, asked.prompt, frame=frame, origin=origin, every_turn=reading.every_turn)
        rows = [pair if isinstance(pair, Dropped) else made(pair) for pair in pairs]
        # No column is the prompt, so it is what the sides share; that can be nothing.
        if not asked.prompt and not schema.joined:
            rows = [row if isinstance(row, Dropped) else whole_pair(row, columns) for row in rows]
        return _with_notes(rows, columns)
    except RecursionError:
        raise ValueError(f"{origin}: the row is nested too deeply") from None


def completion_rows(raw: Raw, origin: str, reading: Reading = AS_FOUND) -> list[CompletionRow | Dropped]:
    """Reads a raw row of any known supervised schema, or the best answer of a preference row.

    Args:
      raw, origin: see `preference_rows`.
      reading: see `preference_rows`; `ranked` is not used.

    Returns:
      One row, whose parts are both strings or both lists of messages, or one Dropped.

    Raises:
      ValueError: see `preference_rows`.
    """
    try:
        columns, schema = detect(raw, COMPLETION_SCHEMAS, reading, origin)
        asked = schema.read(columns, origin)
        if isinstance(asked, Dropped):
            return [asked]
        if not asked.answers:
            return [Dropped(FEW_ANSWERS, origin)]
        top = ranked.best(asked.answers)
        # min_margin applies to supervised rows too: it compares the best answer with the worst.
        worst = min(asked.answers, key=lambda answer: answer.standing)
        dropped = _too_close((top, worst), reading, columns, origin)
        row = dropped or answer_row(asked.prompt, top.text, read_frame(columns, origin), origin)
        return _with_notes([row], columns)
    except RecursionError:
        raise ValueError(f"{origin}: the row is nested too deeply") from None


def _with_notes(rows: Sequence[R | Dropped], columns: Raw) -> list[R | Dropped]:
    """Adds a note to rows with a turn whose role is replaced by another."""
    # Other columns may contain anything, also conversations that are not trained on.
    read = [value for name, value in columns.items() if name in CANONICAL]
    notes = (DEVELOPER,) if any(messages.has_role(value, "developer") for value in read) else ()
    return [row if isinstance(row, Dropped) or not notes else row._replace(notes=row.notes + notes) for row in rows]


def schema_name(raw: Raw, reading: Reading = AS_FOUND, *, supervised: bool = False) -> str:
    """Returns the short name of the schema that reads a row.

    Raises:
      ValueError: no schema reads it.
    """
    return detect(raw, COMPLETION_SCHEMAS if supervised else PREFERENCE_SCHEMAS, reading, "the row")[1].name


def is_ranked(raw: Raw, reading: Reading = AS_FOUND) -> bool:
    """Returns whether a preference row may give more than one pair."""
    return detect(raw, PREFERENCE_SCHEMAS, reading, "the row")[1].ranked


def is_preference(raw: Raw, reading: Reading = AS_FOUND) -> bool:
    """Returns whether `completion_rows` takes the best side of a preference row; False if no schema reads the row."""
    try:
        schema = find(columns_of(raw, reading, "the row"), COMPLETION_SCHEMAS, reading)
    except ValueError:  # `completion_rows` raises it too, with the row's name
        return False
    return schema is not None and schema in PREFERENCE_SCHEMAS


def check_rows(samples: Sequence[Sample], reading: Reading = AS_FOUND, *, supervised: bool = False) -> str:
    """Finds the schemas of the first rows of a dataset, before all rows are read.

    The error for a single row can only show that row; the error of this function shows three rows.

    Args:
      samples: the first raw rows with their origins, at least one.
      reading: see `preference_rows`.
      supervised: read completions, not pairs.

    Returns:
      Names of the schemas that read the rows, in the order of their first row, such as "nectar".

    Raises:
      ValueError: no schema reads one of the rows; the message has the columns with their types, three rows, the known
        formats, and a column_map to paste.
    """
    return _checked(samples, reading, COMPLETION_SCHEMAS if supervised else PREFERENCE_SCHEMAS)


def check_prompts(samples: Sequence[Sample], reading: Reading = AS_FOUND) -> str:
    """Finds the schemas of rows whose prompt is to be answered; otherwise as `check_rows`."""
    return _checked(samples, reading, PROMPT_SCHEMAS)


def _checked(samples: Sequence[Sample], reading: Reading, schemas: Sequence[Schema]) -> str:
    names: dict[str, None] = {}
    for index, (raw, origin) in enumerate(samples):
        schema = find(columns_of(raw, reading, origin), schemas, reading)
        if schema is None:
            others = [sample for place, sample in enumerate(samples) if place != index]
            raise _refused([samples[index], *others], schemas, reading)
        names[schema.name] = None
    return ", ".join(names)


def detect(raw: Raw, schemas: Sequence[Schema], reading: Reading, origin: str) -> tuple[Raw, Schema]:
    """Returns the row's columns under jdpo's names, and the first of the schemas that fits them.

    Raises:
      ValueError: no schema fits.
    """
    columns = columns_of(raw, reading, origin)
    schema = find(columns, schemas, reading)
    if schema is None:
        raise _refused([(raw, origin)], schemas, reading)
    return columns, schema


def find(columns: Raw, schemas: Sequence[Schema], reading: Reading) -> Schema | None:
    """Returns the first of the schemas that fits the columns and reads all mapped ones, or None."""
    # A schema that ignores a mapped column would silently not do what the user asked for.
    mapped = set(reading.column_map or ()).difference(EXTRAS)
    tried = (schema for schema in schemas if mapped.issubset(schema.columns)) if mapped else schemas
    return next((schema for schema in tried if schema.matches(columns)), None)


def _refused(samples: Sequence[Sample], schemas: Sequence[Schema], reading: Reading) -> ColumnsError:
    # The message shows columns before and after the column_map, so that a wrong name is easy to see.
    mapped = [_renamed(raw, reading.column_map, origin) for raw, origin in samples] if reading.column_map else []
    text = refusal(samples, schemas, mapped=mapped, wanted=_wanted(schemas))
    raw, origin = samples[0]
    if schemas is PREFERENCE_SCHEMAS and find(columns_of(raw, reading, origin), COMPLETION_SCHEMAS, reading):
        text += "\nRows with one answer each are for `jdpo sft`; `jdpo dpo` needs two, one better than the other."
    return ColumnsError(text)


def _wanted(schemas: Sequence[Schema]) -> tuple[str, ...]:
    """Returns jdpo's names of the columns that a file of these rows needs."""
    if schemas is PREFERENCE_SCHEMAS:
        return ("prompt", "chosen", "rejected")
    return ("prompt", "completion") if schemas is COMPLETION_SCHEMAS else ("prompt",)


def columns_of(raw: Raw, reading: Reading, origin: str) -> Raw:
    """Returns the row under jdpo's names, without nulls, and with conversations parsed that are written as text."""
    renamed = _renamed(raw, reading.column_map, origin) if reading.column_map else raw
    # Tables have every column in every row, so null is their only way to express absence.
    present = {name: value for name, value in renamed.items() if value is not None}
    columns = {name: as_list(value, name, origin) if name in CANONICAL else value for name, value in present.items()}
    # These columns are never plain text, so text in them is a conversation.
    written = [name for name in conversation_columns.COLUMNS if messages.is_written_out(columns.get(name))]
    if all(messages.is_written_out(columns.get(name)) for name in ("chosen", "rejected")):
        # Both sides, because one side alone may be an answer that happens to be JSON.
        written += [n for n in ("prompt", "chosen", "rejected") if messages.is_written_out(columns.get(n))]
    for name in written:
        columns[name] = messages.from_text(columns[name], name, origin)
    return spread_mask(columns, messages.ROLES, origin)


def _renamed(raw: Raw, column_map: Mapping[str, str], origin: str) -> dict[str, Any]:
    """Returns the row with the columns of `column_map` under jdpo's names; other columns keep their names."""
    for name, column in column_map.items():
        if name not in CANONICAL:
            hint = did_you_mean(name, CANONICAL)
            raise ValueError(
                f"{origin}: column_map names {name!r} for {column!r}, but jdpo reads no column of this name; "
                f"{hint + ' ' if hint else ''}The names are {named(CANONICAL)}"
            )
        if column not in raw:
            raise ValueError(
                f"{origin}: column_map takes {name!r} from {column!r}, which the row lacks; it has {named(raw)}"
            )
        # Checked here, because a score that is not a number would otherwise count as absent.
        if name in (score for pair in SCORES for score in pair) and number(raw[column]) is None is not raw[column]:
            raise ValueError(f"{origin}: {column} ({name}) is {shown(raw[column])}; expected a number")
    # Mapped columns do not also appear under their old names, where another schema could match them.
    taken = {*column_map, *column_map.values()}
    if any(side in raw and column_map.get(side, side) != side for side in ("chosen", "rejected")):
        taken.update(SIDE_SCORES)  # these scores belong to other columns than those mapped to the sides
    # A mapped vote replaces all other votes of the row.
    if not column_map.keys().isdisjoint(votes.VOTES):
        taken.update(votes.all_votes(raw))
    rest = {name: value for name, value in raw.items() if name not in taken}
    return rest | {votes.name_of_vote(name, column): raw[column] for name, column in column_map.items()}


def _too_close(pair: Couple, reading: Reading, columns: Raw, origin: str) -> Dropped | None:
    """Drops a pair because of `min_margin`; returns None if the pair is kept."""
    if reading.min_margin is None:
        return None
    margin = ranked.margin(*pair)
    if margin is None:
        names = ", ".join(" and ".join(pair) for pair in SCORES)
        raise ValueError(
            f"{origin}: min_margin {reading.min_margin:g} needs scores, but the row has none. Found: {named(columns)}. "
            f"Scores are read from {names}, a rating of two, score_A and score_B, or pm_score; map other columns to "
            "score_chosen and score_rejected with column_map, or remove min_margin"
        )
    # Counted with a reason of its own: it is usually a mistake in the file, not a close pair.
    if margin < 0:
        return Dropped(CONTRADICTED, origin, f"margin {margin:g}")
    return Dropped(BELOW_MARGIN, origin, f"margin {margin:g}") if margin < reading.min_margin else None
