"""Pairs of earlier rounds that are trained on again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from jdpo.durable import write_durably


def num_replayed(num_new: int, num_old: int, share: float) -> int:
    """Returns how many older pairs make up a share of the training pairs, at most all of them.

    >>> num_replayed(80, 500, 0.2), num_replayed(80, 5, 0.2), num_replayed(80, 500, 0)
    (20, 5, 0)
    """
    return min(num_old, round(num_new * share / (1 - share)))


def write_replay(path: Path, new: Path, older: Sequence[Path], share: float, seed: int) -> int:
    """Writes a random sample of older pairs, as large as `num_replayed` says.

    Args:
      path: the file to write.
      new: the pairs of this round.
      older: the files of earlier rounds.
      seed: of the sample.

    Returns:
      the number of pairs written.
    """
    # Lines as they are: rows are read once, by the run that trains on them.
    lines = [line for file in older for line in file.read_bytes().splitlines(keepends=True)]
    count = num_replayed(count_lines(new), len(lines), share)
    places = sorted(range(len(lines)), key=lambda place: hashlib.sha256(f"{seed}:{place}".encode()).digest())
    write_durably(path, b"".join(lines[place] for place in sorted(places[:count])))
    return count


def count_lines(path: Path) -> int:
    """Returns the number of rows of a JSONL file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)
