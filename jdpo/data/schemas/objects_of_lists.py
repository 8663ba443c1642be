"""Objects of lists that represent lists of objects, the form in which `datasets.Sequence` of a dict stores them.

{"role": ["user", "assistant"], "content": ["Hi", "Hello"]}
[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
"""

from __future__ import annotations

from typing import Any

_KEYS = {"role", "from", "rank", "pm_score", "function", "name", "type"}
"""Objects in the lists of known schemas have at least one of these keys."""


def is_of_lists(value: Any) -> bool:
    """Returns whether a value is an object of lists that represents a list of objects.

    >>> is_of_lists({"role": ["user"], "content": ["Hi"]}), is_of_lists({"role": "user", "content": ["Hi"]})
    (True, False)
    """
    return (
        isinstance(value, dict)
        and not _KEYS.isdisjoint(value)
        and all(isinstance(items, list | None) for items in value.values())
        and any(isinstance(items, list) for items in value.values())
    )


def from_lists(value: dict[str, Any], place: str, origin: str) -> list[dict[str, Any]]:
    """Reads an object of lists as a list of objects.

    Args:
      value: a value for which `is_of_lists` is true.
      place: the column, for messages.
      origin: where the row came from, for messages.

    Raises:
      ValueError: the lists have different lengths.
    """
    # A null list means that no object has this key.
    lists = {key: items for key, items in value.items() if items is not None}
    lengths = {key: len(items) for key, items in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in list(lengths.items())[:6])
        raise ValueError(
            f"{origin}: {place} is an object of lists, as datasets.Sequence of a dict stores a list of objects; "
            f"expected lists of the same length, but {found}"
        )
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def as_list(value: Any, place: str, origin: str) -> Any:
    """Returns the value, or the list of objects that it represents."""
    return from_lists(value, place, origin) if is_of_lists(value) else value
