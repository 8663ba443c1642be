"""Sizes of the results of Python's text methods, computed before the methods are called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_WIDTHS = re.compile(r"[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_BRACKETS = re.compile(r"[()]")


def format_fields(text: str) -> Iterator[tuple[str | None, ...]]:
    """Yields the width and the precision of every field of a `%` format; keys may contain brackets, as in Python."""
    place = text.find("%")
    while place >= 0:
        place += 1
        if text[place : place + 1] == "(":
            depth = 0
            for bracket in _BRACKETS.finditer(text, place):
                depth += 1 if bracket.group() == "(" else -1
                if not depth:
                    place = bracket.end()
                    break
            else:
                return  # Python refuses a key whose bracket is not closed
        found = _WIDTHS.match(text, place)
        assert found is not None
        yield found.groups()
        place = text.find("%", found.end() + (text[found.end() : found.end() + 1] == "%"))


def num_pieces(text: Any, name: str, separator: Any = None) -> int:
    """Returns an upper bound on the number of pieces that splitting a text gives."""
    if name == "splitlines":
        return 1 + len(re.findall(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text)) if isinstance(text, str) else len(text)
    if isinstance(separator, str | bytes) and separator:
        return 1 + int(text.count(separator))
    return sum(1 for _ in re.finditer(r"\S+" if isinstance(text, str) else rb"\S+", text))
