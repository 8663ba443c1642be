"""Lengths of rows as a user gives them: numbers, or a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

Lengths = tuple[int, ...]
"""Tokens of prompt, chosen and rejected, or of a supervised row."""


def read_lengths(text: str) -> list[Lengths]:
    """Returns the lengths of each row that `--lengths` names.

    Args:
      text: numbers, such as 512,300,300, for rows that are all alike; or the path of a CSV file with a header and a
        line of numbers per row.

    Raises:
      ValueError: it is neither.

    >>> read_lengths("512,300,300")
    [(512, 300, 300)]
    """
    if text.endswith(".csv"):
        return _in_file(Path(text).expanduser())
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise ValueError(f"--lengths: expected numbers, such as 512,300,300, or a CSV file, found {text!r}")
    return [tuple(int(number) for number in text.split(","))]


def _in_file(path: Path) -> list[Lengths]:
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"--lengths {path}: expected a CSV file with a header and rows of numbers ({error})"
        ) from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if len(rows) < 2:
        raise ValueError(f"--lengths {path}: expected a header and at least one row of numbers")
    (_, header), *rest = rows
    if all(word.strip().isdecimal() for word in header):
        raise ValueError(
            f"--lengths {path}: the first line is {','.join(header)}; expected a header, such as prompt,chosen,rejected"
        )
    for number, line in rest:
        if len(line) != len(header) or not all(word.strip().isdecimal() for word in line):
            raise ValueError(
                f"--lengths {path}, line {number}: expected {len(header)} numbers, as many as the header has names, "
                f"found {','.join(line)!r}"
            )
    return [tuple(int(word) for word in line) for _, line in rest]


def check_lengths(lengths: Sequence[Lengths], *, pairs: bool, max_length: int) -> None:
    """Refuses lengths that a run cannot have.

    Args:
      pairs: True for a config of `jdpo dpo`, False for one of `jdpo sft`.
      max_length: of the config.

    Raises:
      ValueError: another number of parts, an empty part, or a sequence longer than max_length; names the first row.
    """
    expected, parts = ("prompt, chosen and rejected, such as 512,300,300", 3) if pairs else ("a row, such as 812", 1)
    for number, row in enumerate(lengths, start=1):
        where = f"--lengths {','.join(map(str, row))}" if len(lengths) == 1 else f"--lengths, row {number}"
        if len(row) != parts or min(row) < 1:
            command = "dpo" if pairs else "sft"
            raise ValueError(
                f"{where}: expected the tokens of {expected}, each at least 1, as this is a config of `jdpo {command}` "
                "(--task selects the command)"
            )
        longest = row[0] + max(row[1:], default=0)
        if longest > max_length:
            raise ValueError(
                f"{where}: a sequence of {longest} tokens is longer than max_length {max_length}, where a run cuts it; "
                "give the lengths after the cut, or a larger max_length"
            )
