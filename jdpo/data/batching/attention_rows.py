"""Puts attention sequences back to back in attention rows: best fit, the longest sequence first.

lengths 5 4 3 2 1, rows of 8 places        row 0   A A A A A C C C
                                           row 1   B B B B D D E .
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class JoinedRows(NamedTuple):
    """Where each sequence is, int64 [sequences] each.

    Attributes:
      row: number of its attention row.
      start: its first place in the row.
      number: how many sequences of the row are before it.
    """

    row: np.ndarray
    start: np.ndarray
    number: np.ndarray


def join_sequences(lengths: np.ndarray, num_places: int, most: int | None) -> JoinedRows:
    """Joins sequences into few rows; ties are decided by the order of sequences and rows.

    Args:
      lengths: int [sequences], each at most num_places.
      num_places: places of a row.
      most: maximum number of sequences of a row; None: no limit. With 1, sequence i is row i.

    >>> [array.tolist() for array in join_sequences(np.array([5, 4, 3, 2, 1]), 8, None)]
    [[0, 1, 0, 1, 1], [0, 0, 5, 4, 6], [0, 0, 1, 1, 2]]
    """
    num_sequences = len(lengths)
    if most == 1:
        zeros = np.zeros(num_sequences, np.int64)
        return JoinedRows(np.arange(num_sequences), zeros, zeros)
    joined = np.empty((3, num_sequences), np.int64)
    row_of, start_of, number_of = [0] * num_sequences, [0] * num_sequences, [0] * num_sequences
    # Rows with space, as (free places, row) in one number, which is compared faster than a tuple.
    numbers = num_sequences + 1
    space: list[int] = []
    held: list[int] = []  # sequences of each row
    order = np.argsort(-lengths, kind="stable")
    for sequence, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        # The row with the least space that is enough.
        found = bisect_left(space, length * numbers)
        free, row = divmod(space.pop(found), numbers) if found < len(space) else (num_places, len(held))
        if row == len(held):
            held.append(0)
        row_of[sequence], start_of[sequence], number_of[sequence] = row, num_places - free, held[row]
        held[row] += 1
        # A row without space leaves the list, as does one that holds enough sequences.
        if free > length and held[row] != most:
            insort(space, (free - length) * numbers + row)
    joined[:] = row_of, start_of, number_of
    return JoinedRows(*joined)
