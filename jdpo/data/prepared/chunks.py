"""A few hundred raw rows read, told apart, tokenized, checked and counted together.

A chunk is what one process works on at a time. What comes of it does not depend on the other chunks, so that the rows
are the same whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jdpo.data.prepared import token_checks
from jdpo.data.prepared.held_out import TOLD_IN_TRAINING, Part, prompt_key, turn_key
from jdpo.data.prepared.row_arrays import TAG_TYPES, Block, Tags, block_of
from jdpo.data.schemas import formats
from jdpo.data.schemas.formats import Dropped, Reading
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.rendering import REFUSED
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
    """How raw rows become tokenized ones: all that this depends on beside rows and tokenizer.

    Attributes:
      kind: what the rows are for.
      max_length, max_prompt_length: see `jdpo.data.tokens.tokenize`.
      loss_on: the turns that are learnt.
      readings: how the rows of each data set are to be read.
      part: which rows are kept, by hash of the prompt; None: all.
    """

    kind: Literal["pairs", "completions"]
    max_length: int
    max_prompt_length: int | None
    loss_on: tokenize.LossOn = "completion"
    readings: tuple[Reading, ...]
    part: Part | None = None

    @property
    def row_type(self) -> type[Any]:
        """What a tokenized row is."""
        if self.kind == "completions":
            return TokenizedCompletion
        return MaskedPair if self.loss_on == "assistant_turns" else TokenizedPair

    def read(self, raw: Mapping[str, Any], origin: str, dataset: int, counts: Counter[str]) -> Sequence[Any]:
        """The rows that a raw row of a data set gives, or Dropped in their place."""
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
        """The results of each row: one, except where the turns of a conversation are sequences of their own."""
        lengths: dict[str, Any] = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
        every_turn = self.loss_on == "assistant_turns"
        if self.kind == "pairs":
            pairs = tokenize.tokenize_pairs(rows, tokenizer, every_turn=every_turn, **lengths)
            return [[result] for result in pairs]
        if every_turn:
            return tokenize.tokenize_turns(rows, tokenizer, **lengths)
        return [[result] for result in tokenize.tokenize_completions(rows, tokenizer, **lengths)]


class RawChunk(NamedTuple):
    """Raw rows of one data set with their origins, and the number of the data set."""

    dataset: int
    rows: Sequence[tuple[Mapping[str, Any], str]]


class Chunk(NamedTuple):
    """What came of a `RawChunk`: the rows that are kept, what was counted, and the first row of each count."""

    dataset: int
    block: Block
    counts: dict[str, int]
    examples: dict[str, str]


def make_chunk(shared: tuple[Recipe, Tokenizer], raw: RawChunk) -> Chunk:
    """Works on one chunk.

    Args:
      shared: what all chunks have in common.
      raw: the rows.

    Raises:
      ValueError: a row that cannot be read; it is named.
    """
    recipe, tokenizer = shared
    tally = Tally()
    tally.counts[READ] += len(raw.rows)
    read = [row for one, origin in raw.rows for row in recipe.read(one, origin, raw.dataset, tally.counts)]
    rows, keys = _of_part(read, recipe.part, tally)
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
                kept.append((row, result, key if number == len(found) else turn_key(key, number)))
    block = _counted_block(kept, raw.dataset, recipe, tokenizer, tally)
    return Chunk(raw.dataset, block, dict(tally.counts), tally.examples)


def _of_part(rows: Sequence[Any], part: Part | None, tally: Tally) -> tuple[list[Any], list[int]]:
    """The rows of a part with their prompt keys; those of the other part are counted.

    A row that was dropped has no prompt to tell its part by: it has key 0, and is told of among the training rows.
    """
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
) -> Block:
    """The rows that are kept as a block, counted with what was done to each and what is wrong with it."""
    margins = [np.nan if (margin := getattr(row, "margin", None)) is None else margin for row, _, _ in kept]
    tags = Tags(
        np.full(len(kept), dataset, TAG_TYPES["dataset"]),
        np.array([key for _, _, key in kept], TAG_TYPES["prompt_key"]),
        np.array(margins, TAG_TYPES["margin"]),
    )
    block = block_of([result.row for _, result, _ in kept], recipe.row_type, tags)
    faults = token_checks.check_block(
        block,
        token_checks.expected_of(tokenizer),
        plain=np.array([isinstance(row.prompt, str) for row, _, _ in kept], bool),
        cut=np.array([tokenize.COMPLETION_CUT in result.notes for _, result, _ in kept], bool),
        max_length=recipe.max_length,
    )
    tally.counts[KEPT] += len(kept)
    for index, (row, result, _) in enumerate(kept):
        for name in (*row.notes, *result.notes, *(fault for fault, rows in faults.items() if rows[index])):
            tally.add(name, row.origin)
    return block


MOST_REFUSALS = 20
"""Messages of a chat template that are counted apart; a template may write the words of a row into its message."""

_LONGEST_REFUSAL = 120
_REFUSED = DROPPED + REFUSED
OTHER_REFUSALS = f"{_REFUSED} for other reasons"


class Tally:
    """What was counted, and the first row of each count."""

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None) -> None:
        self.counts = Counter(counts or {READ: 0, KEPT: 0})
        self.examples = dict(examples or {})

    def add(self, name: str, example: str) -> None:
        """Counts a row."""
        name = self._name(name)
        self.counts[name] += 1
        self.examples.setdefault(name, example)

    def drop(self, row: Dropped) -> None:
        """Counts a row that is not kept."""
        example = terminal(row.origin + (f": {row.detail}" if row.detail else ""))
        if row.reason != REFUSED or not row.detail:
            self.add(DROPPED + row.reason, example)
            return
        said = " ".join(terminal(row.detail).split())
        if len(said) > _LONGEST_REFUSAL:
            self.add(f"{_REFUSED}: {said[:_LONGEST_REFUSAL]}...", example)
        else:
            self.add(f"{_REFUSED}: {said}", terminal(row.origin))

    def _name(self, name: str) -> str:
        """The name to count under: refusals of a chat template beyond the first `MOST_REFUSALS` share one."""
        if name in self.counts or not name.startswith(_REFUSED):
            return name
        known = sum(one.startswith(f"{_REFUSED}:") for one in self.counts)
        return name if known < MOST_REFUSALS else OTHER_REFUSALS

    def take(self, chunk: Chunk) -> None:
        """Adds what was counted of the rows that follow."""
        for name, count in chunk.counts.items():
            own = self._name(name)
            self.counts[own] += count
            if name in chunk.examples:
                self.examples.setdefault(own, chunk.examples[name])

    def as_dict(self) -> dict[str, Any]:
        """What is kept with the rows."""
        return {"counts": {name: count for name, count in self.counts.items() if count}, "examples": self.examples}

    def lines(self) -> list[str]:
        """For the user."""
        counts = {name: count for name, count in sorted(self.counts.items()) if count and name not in (READ, KEPT)}
        return [f"{figure(self.counts[READ], 'row')} read, {self.counts[KEPT]:,} kept"] + [
            terminal(f"  {count:,} {name}" + (f" (the first: {self.examples[name]})" if name in self.examples else ""))
            for name, count in counts.items()
        ]
