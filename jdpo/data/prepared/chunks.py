"""Chunks: a few hundred raw rows that one process parses, tokenizes, checks and counts at a time.

The result of a chunk does not depend on other chunks, so the rows are the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jdpo.data.prepared import token_checks
from jdpo.data.prepared.held_out import TOLD_IN_TRAINING, Part, prompt_key, turn_key
from jdpo.data.prepared.row_arrays import TAG_TYPES, RowArrays, Tags, row_arrays
from jdpo.data.schemas import formats
from jdpo.data.schemas.formats import Dropped, Reading
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.row_rendering import REFUSED
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal
from jdpo.types import CompletionRow, MaskedPair, PreferenceRow, TokenizedCompletion, TokenizedPair
from jdpo.words import figure

READ, KEPT, DROPPED = "rows read", "rows kept", "dropped: "
CHOSEN_LEARNT = "preference rows of which the chosen side is learnt"
RANKED, RANKED_PAIRS = "ranked rows", "pairs made of ranked rows"
SPLIT_ROWS = "conversations of several sequences: the chat template writes earlier turns differently"
SPLIT_SEQUENCES = "sequences made of such conversations"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that tokenized rows depend on, besides the raw rows and the tokenizer. Part of the cache's key.

    Attributes:
      kind: preference pairs, or supervised completions.
      max_length, max_prompt_length: see `jdpo.data.tokens.tokenize`.
      loss_on: the turns that are learnt.
      readings: how to read the rows of each dataset.
      part: the side of the train/eval split to keep; None: all rows.
    """

    kind: Literal["pairs", "completions"]
    max_length: int
    max_prompt_length: int | None
    loss_on: tokenize.LossOn = "completion"
    readings: tuple[Reading, ...]
    part: Part | None = None

    @property
    def row_type(self) -> type[Any]:
        """The type of a tokenized row."""
        if self.kind == "completions":
            return TokenizedCompletion
        return MaskedPair if self.loss_on == "assistant_turns" else TokenizedPair

    def read(self, raw: Mapping[str, Any], origin: str, dataset: int, counts: Counter[str]) -> Sequence[Any]:
        """Reads a raw row of a dataset; returns its rows, with Dropped for each that cannot be used."""
        reading = self.readings[dataset]
        if self.kind == "completions":
            counts[CHOSEN_LEARNT] += formats.is_preference(raw, reading)
            return formats.completion_rows(raw, origin, reading)
        rows = formats.preference_rows(raw, origin, reading)
        if formats.is_ranked(raw, reading):
            counts[RANKED] += 1
            counts[RANKED_PAIRS] += sum(not isinstance(row, Dropped) for row in rows)
        return rows

    def tokenize(self, rows: Sequence[Any], tokenizer: Tokenizer) -> Sequence[Sequence[Any]]:
        """Tokenizes rows; returns a list of results per row, longer than one if its turns need several sequences."""
        lengths: dict[str, Any] = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
        # Pairs give one row each, whatever is learnt of them. A conversation may need several sequences.
        every_turn = self.loss_on == "assistant_turns"
        if self.kind == "pairs":
            pairs = tokenize.tokenize_pairs(rows, tokenizer, every_turn=every_turn, **lengths)
            return [[result] for result in pairs]
        if every_turn:
            return tokenize.tokenize_turns(rows, tokenizer, **lengths)
        return [[result] for result in tokenize.tokenize_completions(rows, tokenizer, **lengths)]


class RawChunk(NamedTuple):
    """Raw rows of one dataset with their origins, and the number of the dataset."""

    dataset: int
    rows: Sequence[tuple[Mapping[str, Any], str]]


class Chunk(NamedTuple):
    """The result of a `RawChunk`: the rows that are kept, the counts, and the first row of each count."""

    dataset: int
    block: RowArrays
    counts: dict[str, int]
    examples: dict[str, str]


def make_chunk(shared: tuple[Recipe, Tokenizer], raw: RawChunk) -> Chunk:
    """Reads, tokenizes and checks the rows of one chunk.

    Args:
      shared: the recipe and the tokenizer, the same for all chunks.
      raw: the rows.

    Raises:
      ValueError: a row cannot be read; the message names it.
    """
    recipe, tokenizer = shared
    tally = Tally()
    tally.counts[READ] += len(raw.rows)
    # One raw row may give several rows (ranked answers) or none to train on (Dropped).
    read = [row for one, origin in raw.rows for row in recipe.read(one, origin, raw.dataset, tally.counts)]
    rows, keys = _of_part(read, recipe.part, tally)
    # All rows of the chunk are tokenized in one call, because the tokenizer works on a batch in parallel.
    results = iter(recipe.tokenize([row for row in rows if not isinstance(row, Dropped)], tokenizer))
    kept: list[tuple[PreferenceRow | CompletionRow, Any, int]] = []
    for row, key in zip(rows, keys, strict=True):
        found = [row] if isinstance(row, Dropped) else next(results)
        if len(found) > 1:
            tally.add(SPLIT_ROWS, row.origin)
            tally.counts[SPLIT_SEQUENCES] += len(found)
        for number, result in enumerate(found, 1):
            if isinstance(result, Dropped):
                tally.drop(result)
            else:
                # The last sequence of a conversation has the key of its row; earlier ones have keys of their own.
                kept.append((row, result, key if number == len(found) else turn_key(key, number)))
    block = _counted_block(kept, raw.dataset, recipe, tokenizer, tally)
    return Chunk(raw.dataset, block, dict(tally.counts), tally.examples)


def _of_part(rows: Sequence[Any], part: Part | None, tally: Tally) -> tuple[list[Any], list[int]]:
    """Returns the rows of one side of the train/eval split with their prompt keys, and counts the other rows.

    A dropped row has no prompt that could be hashed. It has key 0 and is reported with the training rows.
    """
    # Keys are computed before rows are tokenized: the split depends on the text of the file, not on the tokenizer.
    kept, keys = [], []
    for row in rows:
        key = 0 if isinstance(row, Dropped) else prompt_key(row.prompt)
        if part is None or (part.side == "train" if isinstance(row, Dropped) else part.has(key)):
            kept.append(row)
            keys.append(key)
        else:
            tally.counts[TOLD_IN_TRAINING if isinstance(row, Dropped) else part.others] += 1
    return kept, keys


def _counted_block(
    kept: Sequence[tuple[Any, Any, int]], dataset: int, recipe: Recipe, tokenizer: Tokenizer, tally: Tally
) -> RowArrays:
    """Joins the kept rows into arrays, and counts the notes and the faults of each row."""
    # Supervised rows have no margin.
    margins = [np.nan if (margin := getattr(row, "margin", None)) is None else margin for row, _, _ in kept]
    tags = Tags(
        np.full(len(kept), dataset, TAG_TYPES["dataset"]),
        np.array([key for _, _, key in kept], TAG_TYPES["prompt_key"]),
        np.array(margins, TAG_TYPES["margin"]),
    )
    block = row_arrays([result.row for _, result, _ in kept], recipe.row_type, tags)
    faults = token_checks.find_faults(
        block,
        token_checks.expected_of(tokenizer),
        plain=np.array([isinstance(row.prompt, str) for row, _, _ in kept], bool),
        # A truncated completion has no end token, and must not be reported for it.
        cut=np.array([tokenize.COMPLETION_CUT in result.notes for _, result, _ in kept], bool),
        max_length=recipe.max_length,
    )
    tally.counts[KEPT] += len(kept)
    for index, (row, result, _) in enumerate(kept):
        # Notes of reading, of tokenizing and of the checks are counted in the same way.
        for name in (*row.notes, *result.notes, *(fault for fault, rows in faults.items() if rows[index])):
            tally.add(name, row.origin)
    return block


MOST_REFUSALS = 20
"""Different refusals of a chat template that are counted separately. A refusal may quote the row, so there may be many.
"""

_LONGEST_REFUSAL = 120
_REFUSED = DROPPED + REFUSED
OTHER_REFUSALS = f"{_REFUSED} for other reasons"


class Tally:
    """Counts of rows by name, and the first row of each count."""

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None) -> None:
        self.counts = Counter(counts or {READ: 0, KEPT: 0})
        self.examples = dict(examples or {})

    def add(self, name: str, example: str) -> None:
        """Counts a row under a name."""
        name = self._name(name)
        self.counts[name] += 1
        # The first row of each count, which a user can look up in the file.
        self.examples.setdefault(name, example)

    def drop(self, row: Dropped) -> None:
        """Counts a row that is dropped, under its reason."""
        example = terminal(row.origin + (f": {row.detail}" if row.detail else ""))
        if row.reason != REFUSED or not row.detail:
            self.add(DROPPED + row.reason, example)
            return
        refusal = " ".join(terminal(row.detail).split())
        if len(refusal) > _LONGEST_REFUSAL:
            self.add(f"{_REFUSED}: {refusal[:_LONGEST_REFUSAL]}...", example)
        else:
            self.add(f"{_REFUSED}: {refusal}", terminal(row.origin))

    def _name(self, name: str) -> str:
        """Returns the name to count under: all refusals of a chat template after `MOST_REFUSALS` share one name."""
        if name in self.counts or not name.startswith(_REFUSED):
            return name
        # Without a limit, a template that quotes the row in its message would give one count per row.
        known = sum(one.startswith(f"{_REFUSED}:") for one in self.counts)
        return name if known < MOST_REFUSALS else OTHER_REFUSALS

    def take(self, chunk: Chunk) -> None:
        """Adds the counts of the next chunk."""
        for name, count in chunk.counts.items():
            # The limit on refusals holds over all chunks, so a name of a chunk may become OTHER_REFUSALS here.
            own = self._name(name)
            self.counts[own] += count
            if name in chunk.examples:
                self.examples.setdefault(own, chunk.examples[name])

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON values that are stored with the rows."""
        return {"counts": {name: count for name, count in self.counts.items() if count}, "examples": self.examples}

    def lines(self) -> list[str]:
        """Returns the lines of the summary that the user sees."""
        counts = {name: count for name, count in sorted(self.counts.items()) if count and name not in (READ, KEPT)}
        return [f"{figure(self.counts[READ], 'row')} read, {self.counts[KEPT]:,} kept"] + [
            terminal(f"  {count:,} {name}" + (f" (the first: {self.examples[name]})" if name in self.examples else ""))
            for name, count in counts.items()
        ]
