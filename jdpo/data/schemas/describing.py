"""Short, printable descriptions of values and names from files, for messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jdpo.safe_text import terminal
from jdpo.words import listed

LONGEST_NAME = 60
MOST_NAMED = 40
"""A message has at most MOST_NAMED names, of at most LONGEST_NAME characters each."""


def kind(value: Any) -> str:
    """Returns the name of a value's type for a message."""
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number"}
    # By exact type, because a boolean is also an int in Python.
    return names.get(type(value), type(value).__name__)


def shown(value: Any, width: int = 60) -> str:
    """Returns a value as one short line of printable characters."""
    # reprlib stops early: repr of a large row would be built in full only to be cut.
    short = reprlib.Repr()
    short.maxstring = short.maxother = width
    short.maxlist, short.maxdict, short.maxlevel = 3, 6, 3
    text = short.repr(value)
    return text if len(text) <= 2 * width else f"{text[: 2 * width]}..."


def named(columns: Mapping[str, object] | Sequence[str]) -> str:
    """Returns a list of column names, printable."""
    return listed([printable(name) for name in map(str, columns)], MOST_NAMED) or "none"


def printable(name: str) -> str:
    """Returns a name from a file, printable and at most LONGEST_NAME characters long."""
    text = terminal(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."
