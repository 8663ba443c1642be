"""Tokenized rows as a few large arrays, the form in which processes exchange them and files store them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jdpo.types import AnyPair, TokenizedCompletion

R = TypeVar("R", bound=AnyPair | TokenizedCompletion)


class Tags(NamedTuple):
    """Values stored with the tokens of each row.

    Attributes:
      dataset: int32 [rows], the number of the dataset.
      prompt_key: uint64 [rows], a hash of the prompt's text.
      margin: float32 [rows], score of the chosen side minus that of the rejected; NaN without scores.
    """

    dataset: np.ndarray
    prompt_key: np.ndarray
    margin: np.ndarray


TAG_TYPES: dict[str, np.dtype] = {
    "dataset": np.dtype(np.int32),
    "prompt_key": np.dtype(np.uint64),
    "margin": np.dtype(np.float32),
}


class RowArrays(NamedTuple):
    """Rows of one type, field by field.

    Attributes:
      values: {field: the elements of all rows, one row after the other}.
      lengths: {field: int32 [rows], number of elements of each row}.
      origins: where each row came from.
      tags: see `Tags`.
    """

    values: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    origins: list[str]
    tags: Tags

    def __len__(self) -> int:
        return len(self.origins)


def row_arrays(rows: Sequence[R], row_type: type[R], tags: Tags) -> RowArrays:
    """Joins rows of one type into arrays."""
    *fields, origin = row_type._fields
    values, lengths = {}, {}
    for field in fields:
        vectors = [getattr(row, field) for row in rows]
        lengths[field] = np.array([len(vector) for vector in vectors], np.int32)
        # The empty array in front gives a result also if there are no rows, and fixes the dtype.
        values[field] = np.concatenate([np.zeros(0, dtype_of(field)), *vectors]).astype(dtype_of(field), copy=False)
    return RowArrays(values, lengths, [getattr(row, origin) for row in rows], tags)


def concatenated(blocks: Sequence[RowArrays]) -> RowArrays:
    """Concatenates arrays of rows of one type."""
    first = blocks[0]
    return RowArrays(
        {field: np.concatenate([block.values[field] for block in blocks]) for field in first.values},
        {field: np.concatenate([block.lengths[field] for block in blocks]) for field in first.lengths},
        [origin for block in blocks for origin in block.origins],
        Tags(*(np.concatenate(arrays) for arrays in zip(*(block.tags for block in blocks), strict=True))),
    )


def longest(lengths: dict[str, np.ndarray], row_type: type[Any]) -> np.ndarray:
    """Returns the number of tokens of the longest sequence of each row, int32 [rows], given those of each field."""
    if row_type is not TokenizedCompletion:
        # A pair is two sequences that share their prompt.
        sides = np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        return (lengths["prompt_ids"] + sides).astype(np.int32)
    return lengths["tokens"].astype(np.int32)


def interleaved(block: RowArrays) -> bytes:
    """Returns the bytes that the content digest covers.

    They are, for each row and each of its fields, the number of elements and the elements. They do not depend on how
    rows are divided into chunks.
    """
    parts = []
    for field, values in block.values.items():
        ends = block.lengths[field].cumsum()
        # Views of each row's elements; nothing is copied until they are concatenated.
        parts.append(np.split(values, ends[:-1]))
    counts = [[len(vector).to_bytes(4, "little") for vector in vectors] for vectors in parts]
    pieces = zip(*(zip(count, vectors, strict=True) for count, vectors in zip(counts, parts, strict=True)), strict=True)
    # Lengths are part of the bytes: without them, tokens moved from one field to the next would give the same digest.
    return b"".join(piece for row in pieces for count, vector in row for piece in (count, vector.tobytes()))


def dtype_of(field: str) -> np.dtype:
    """Returns the dtype of a field of tokenized rows."""
    # int32 holds every token id, and is the dtype of the batches, so nothing is converted later.
    return np.dtype(np.bool_ if field.endswith("_mask") else np.int32)
