"""Values and names of a file, in the words of a message: short and printable."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jdpo.safe_text import terminal

LONGEST_NAME = 60
MOST_NAMED = 40
"""Names of columns or keys in a message at most, and the characters of each."""


def kind(value: Any) -> str:
    """The type of a value in the words of a message."""
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any, width: int = 60) -> str:
    """A value in one short line of printable characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = width
    short.maxlist, short.maxdict, short.maxlevel = 3, 6, 3
    text = short.repr(value)
    return text if len(text) <= 2 * width else f"{text[: 2 * width]}..."


def named(columns: Mapping[str, object] | Sequence[str]) -> str:
    """Column names in a row, printable."""
    return listed([printable(name) for name in map(str, columns)])


def listed(names: Sequence[str]) -> str:
    """Names in a row, the first of many."""
    rest = len(names) - MOST_NAMED
    return (", ".join(names[:MOST_NAMED]) or "none") + (f" and {rest} more" if rest > 0 else "")


def printable(name: str) -> str:
    """A name from a file, printable and not long."""
    text = terminal(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."
