"""Puts attention sequences back to back in attention rows.

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


SEARCHED = 64
"""Up to this many sequences, rows are filled as far as possible where the best fit is not good enough. With more, it is
close to the lower bound, and a search would take long."""


def join_sequences(lengths: np.ndarray, num_places: int, most: int | None) -> JoinedRows:
    """Joins sequences into few rows; ties are decided by the order of sequences and rows.

    Args:
      lengths: int [sequences], each at most num_places.
      num_places: places of a row.
      most: maximum number of sequences of a row; None: no limit. With 1, sequence i is row i.

    >>> [array.tolist() for array in join_sequences(np.array([5, 4, 3, 2, 1]), 8, None)]
    [[0, 1, 0, 1, 1], [0, 0, 5, 4, 6], [0, 0, 1, 1, 2]]
    """
    if most == 1:
        zeros = np.zeros(len(lengths), np.int64)
        return JoinedRows(np.arange(len(lengths)), zeros, zeros)
    order = np.argsort(-lengths, kind="stable")
    rows = _best_fit(order.tolist(), lengths[order].tolist(), num_places, None)
    if len(lengths) <= SEARCHED and len(rows) > -(-int(lengths.sum()) // num_places):
        rows = min(rows, _filled_in_turn(order.tolist(), lengths.tolist(), num_places), key=len)
    # A limit that these rows keep changes nothing. So what is planned without one, or with a higher one, is what is
    # packed with the number of sequences that its fullest row has.
    if most is not None and max(map(len, rows)) > most:
        rows = _best_fit(order.tolist(), lengths[order].tolist(), num_places, most)
    # In the order of rows, and of the sequences in each.
    sequences = np.concatenate([np.array(row) for row in rows])
    held = np.array([len(row) for row in rows])
    first = np.repeat(held.cumsum() - held, held)
    ends = lengths[sequences].cumsum()
    starts = ends - lengths[sequences]
    joined = np.empty((3, len(lengths)), np.int64)
    joined[:, sequences] = np.repeat(np.arange(len(rows)), held), starts - starts[first], np.arange(len(first)) - first
    return JoinedRows(*joined)


def _best_fit(order: list[int], lengths: list[int], num_places: int, most: int | None) -> list[list[int]]:
    """Puts each sequence, the longest first, into the row with the least space that is enough; a new row if none has.

    Args:
      order: sequences, the longest first.
      lengths: in this order.
    """
    rows: list[list[int]] = []
    # Rows with space, as (free places, row) in one number, which is compared faster than a tuple.
    numbers = len(order) + 1
    space: list[int] = []
    for sequence, length in zip(order, lengths, strict=True):
        found = bisect_left(space, length * numbers)
        free, row = divmod(space.pop(found), numbers) if found < len(space) else (num_places, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sequence)
        # A row without space leaves the list, as does one that holds enough sequences.
        if free > length and len(rows[row]) != most:
            insort(space, (free - length) * numbers + row)
    return rows


def _filled_in_turn(order: list[int], lengths: list[int], num_places: int) -> list[list[int]]:
    """Fills one row after the other: the longest sequence that is left, and those that leave the least space with it.

    Args:
      order: sequences, the longest first.
      lengths: of all sequences, by their number.
    """
    rows, left = [], order
    while left:
        first, rest = left[0], left[1:]
        space = num_places - lengths[first]
        # Bit i: some of the sequences so far have i tokens together.
        sums = [1]
        for sequence in rest:
            sums.append(sums[-1] | sums[-1] << lengths[sequence] & (2 << space) - 1)
        tokens, row = sums[-1].bit_length() - 1, [first]
        # Backwards: a sequence belongs to the row if the ones before it do not have the tokens without it.
        for sequence, without in zip(reversed(rest), reversed(sums[:-1]), strict=True):
            if not without >> tokens & 1:
                row.append(sequence)
                tokens -= lengths[sequence]
        rows.append(row)
        left = [sequence for sequence in rest if sequence not in row]
    return rows
