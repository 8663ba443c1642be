"""Types of options, which refuse a word with a sentence, and the check that no option is given in vain."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path


def not_empty(word: str) -> str:
    """Refuses an empty word, which as a path would be the current folder."""
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return word


def folder_to_write(word: str) -> str:
    """Reads the value of --output_dir; a file of that name would be found only after hours of work."""
    if "://" in not_empty(word):
        raise argparse.ArgumentTypeError("expected a folder on a disk, found an address")
    if Path(word).is_file():
        raise argparse.ArgumentTypeError(f"{word} is a file; expected a folder")
    return word


def count(word: str) -> int:
    """Reads a whole number of 1 or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, found {word!r}")
    return int(word)


def count_or_none(word: str) -> int:
    """Reads a whole number of 0 or more."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, found {word!r}")
    return int(word)


def above_zero(word: str) -> float:
    """Reads a finite number above 0."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {word!r}")
    return value


def first_given(asked: argparse.Namespace, names: Iterable[str], parser: argparse.ArgumentParser) -> str:
    """Returns the first of these options that has another value than its default, as it is written; empty if none has.

    Args:
      names: as they are in `asked`.
    """
    for name in names:
        if getattr(asked, name) != parser.get_default(name):
            return f"--{name.replace('mesh_', 'mesh.')}"
    return ""
