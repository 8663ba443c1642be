"""Strict parsing of JSON values, and the checks that make a value a row."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Rows nested deeper than this are refused, because the code that processes them is recursive."""

LONGEST_NAME = 60


class _Refused(ValueError):
    """JSON that Python's parser accepts and jdpo refuses."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # dict keeps the last of equal keys; a shorter dict than the list of pairs shows that there were any.
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"the key {quoted(twice)} occurs twice in one object; remove one of them")
    return value


def _constant(name: str) -> Any:
    # Python reads it as a float, but it is not JSON, and other readers refuse it.
    raise _Refused(f"{name} is not a JSON value; write null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def unreadable(error: ValueError | RecursionError) -> str:
    """Returns why JSON with a valid syntax cannot be read."""
    if isinstance(error, _Refused):
        return f"JSON that cannot be read: {error}"
    # Python's decoder is recursive, so it gives up on text that is nested too deeply.
    if isinstance(error, RecursionError):
        return f"JSON that cannot be read: {_TOO_DEEP}"
    return "JSON that cannot be read: a number has thousands of digits; write it as a string"


_TOO_DEEP = f"it is nested too deeply (more than {MAX_DEPTH} levels)"


def checked_row(value: Any, brackets: int, where: str) -> dict[str, Any]:
    """Returns a parsed value after checking that it is an object and not nested too deeply.

    Args:
      value: the parsed value.
      brackets: opening brackets in its text, those in strings included: an upper bound on the depth, which saves
        walking through ordinary rows.
      where: the row's place, for messages.

    Raises:
      ValueError: the value is not an object, or is nested deeper than MAX_DEPTH.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the row's columns, found {json_kind(value)}")
    # Few rows have more than MAX_DEPTH brackets, so most are never walked through.
    if brackets > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"{where}: JSON that cannot be read: {_TOO_DEEP}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return bool(level)


def json_kind(value: Any) -> str:
    """Returns the JSON name of a value's type.

    >>> [json_kind(value) for value in ({}, [], "", True, None, 0.5)]
    ['an object', 'an array', 'a string', 'true or false', 'null', 'a number']
    """
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def quoted(name: str) -> str:
    """Returns a name from a file in quotes, in ASCII and at most LONGEST_NAME characters long.

    >>> print(quoted('a"b'), quoted("x" * 99)[-5:])
    'a"b' xx...
    """
    text = ascii(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3] + "..."


def without_nulls(value: Any) -> Any:
    """Returns a value without null keys of objects, at any depth. Nulls in lists stay.

    >>> without_nulls({"a": None, "b": [{"c": None}, None]})
    {'b': [{}, None]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def text_size(value: Any) -> int:
    """Returns the number of characters and bytes of all texts in a row."""
    # A stack instead of recursion, since this is called for every row.
    size, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str | bytes):
            size += len(value)
    return size
