"""What the tokens of rows say: how long their parts are, which are alike, and which lost their end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import AnyPair, TokenizedCompletion

CHUNK = 4096
"""Rows looked at together."""

TAIL = 4
"""An answer's end token is among its last so many tokens: templates write a newline, or a second marker, behind it."""

PAIR_SIDES = ("chosen", "rejected")
COMPLETION_SIDES = ("completion",)


class SideFacts(NamedTuple):
    """One side of all rows; arrays [rows].

    Attributes:
      length: int64, its tokens; of a supervised row those that are learnt.
      key: uint64, a hash of these tokens.
      cut: bool, it lost its end to max_length: the sequence is as long as that, and no end token closes it.
    """

    length: np.ndarray
    key: np.ndarray
    cut: np.ndarray


class RowFacts(NamedTuple):
    """All rows; arrays [rows].

    Attributes:
      prompt: int64, tokens of the prompt; of a supervised row those that are not learnt.
      sides: "chosen" and "rejected", or "completion".
    """

    prompt: np.ndarray
    sides: dict[str, SideFacts]

    @property
    def sequence_tokens(self) -> np.ndarray:
        """Real tokens of all sequences of each row: 2P + C + R, or those of the supervised row."""
        total: np.ndarray = sum((side.length for side in self.sides.values()), self.prompt * len(self.sides))
        return total


class _Parts(NamedTuple):
    """A row as the length of its prompt, its sides, and how long its sequences are."""

    prompt: int
    sides: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]


def row_facts(data: PreparedData, tokenizer: Tokenizer, *, max_length: int) -> RowFacts:
    """Looks at every row once, holding few of them in memory.

    Args:
      data: tokenized rows, at least one.
      tokenizer: that made them.
      max_length: where sequences were cut.
    """
    chunks = [_chunk_facts(rows, tokenizer.end_token_ids, max_length) for rows in _chunks(data)]
    sides = {}
    for name in chunks[0].sides:
        arrays = zip(*(chunk.sides[name] for chunk in chunks), strict=True)
        sides[name] = SideFacts(*map(np.concatenate, arrays))
    return RowFacts(np.concatenate([chunk.prompt for chunk in chunks]), sides)


def _chunks(data: PreparedData) -> Iterator[list[_Parts]]:
    for start in range(0, len(data), CHUNK):
        yield [_parts(data[index]) for index in range(start, min(start + CHUNK, len(data)))]


def _parts(row: AnyPair | TokenizedCompletion) -> _Parts:
    if not isinstance(row, TokenizedCompletion):
        sides = (row.chosen_ids, row.rejected_ids)
        return _Parts(len(row.prompt_ids), sides, tuple(len(row.prompt_ids) + len(side) for side in sides))
    mask = row.completion_mask
    return _Parts(int((~mask).sum()), (row.tokens[mask],), (len(row.tokens),))


def _chunk_facts(rows: Sequence[_Parts], end_ids: Sequence[int], max_length: int) -> RowFacts:
    names = PAIR_SIDES if len(rows[0].sides) == 2 else COMPLETION_SIDES
    sides = {}
    for number, name in enumerate(names):
        ids = [row.sides[number] for row in rows]
        length = np.array([len(one) for one in ids], np.int64)
        key = np.array([hash_ids(one) for one in ids], np.uint64)
        full = np.array([row.lengths[number] for row in rows]) >= max_length
        sides[name] = SideFacts(length, key, full & ~_closed(ids, length, end_ids))
    return RowFacts(np.array([row.prompt for row in rows], np.int64), sides)


def _closed(ids: Sequence[np.ndarray], length: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """Whether an end token is among the last TAIL tokens of each."""
    flat, row = np.concatenate(ids), np.repeat(np.arange(len(ids)), length)
    from_end = np.repeat(length.cumsum(), length) - np.arange(len(flat))  # 1 for the last token
    closing = np.isin(flat, end_ids) & (from_end <= TAIL)
    found: np.ndarray = np.bincount(row[closing], minlength=len(ids)) > 0
    return found


def hash_ids(ids: np.ndarray) -> int:
    """64 bits that stand for a sequence of token ids."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
