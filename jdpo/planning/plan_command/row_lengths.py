"""The lengths of a run's rows, and how many there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jdpo.planning.plan_command.given_lengths import Lengths

MOST_ROWS = 50_000
"""Rows whose lengths are planned with; of more, an even sample and the longest row."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowLengths:
    """The lengths of a run's rows.

    Attributes:
      lengths: int [rows, parts], parts: prompt, chosen and rejected, or the row alone; of an epoch, in which rows of
        small datasets with large weights are repeated; a single row if all are alike.
      rows_per_epoch: None if it is not known.
      num_rows: all rows whose reference log-probs are needed: those of training and of evaluation; None if not known.
      source: where they are from, as a phrase.
    """

    lengths: np.ndarray
    rows_per_epoch: int | None
    num_rows: int | None
    source: str

    def sample(self, seed: int) -> list[Lengths]:
        """Returns the lengths of all rows, or of a part of many, which holds the longest row."""
        lengths = self.lengths
        if len(lengths) > MOST_ROWS:
            chosen = np.random.default_rng(seed).choice(len(lengths), MOST_ROWS, replace=False)
            # Its step may be the one that needs the most memory.
            chosen[0] = lengths.sum(1).argmax()
            lengths = lengths[chosen]
        return [tuple(row) for row in lengths.tolist()]


def alike(lengths: Lengths, *, source: str) -> RowLengths:
    """Returns the lengths of rows that are all alike, whose number is not known."""
    return RowLengths(lengths=np.array([lengths]), rows_per_epoch=None, num_rows=None, source=source)


def listed_rows(lengths: Sequence[Lengths], *, source: str) -> RowLengths:
    """Returns the lengths of rows that are listed one by one."""
    return RowLengths(lengths=np.array(lengths), rows_per_epoch=len(lengths), num_rows=len(lengths), source=source)
