"""The difference between two texts, word by word."""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple

MOST_WORDS = 2000
"""Longer texts are compared line by line: comparing words takes time with the product of their numbers."""

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
      kind: "same" in both texts, "removed" if only the first has it, "added" if only the second has it.
      text: the words, with the spaces between them.
    """

    kind: Literal["same", "removed", "added"]
    text: str


def word_diff(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Compares two texts; the pieces of each, joined, are the text.

    >>> word_diff("It is Cork.", "It is in Dublin.")[1]
    [Piece(kind='same', text='It is '), Piece(kind='added', text='in Dublin'), Piece(kind='same', text='.')]
    """
    old, new = _cut(before), _cut(after)
    if max(len(old), len(new)) > MOST_WORDS:
        old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    first, second = list[Piece](), list[Piece]()
    # Without `autojunk`, which in long texts would take frequent words for noise.
    for tag, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if start < end:
            first.append(Piece("same" if tag == "equal" else "removed", "".join(old[start:end])))
        if new_start < new_end:
            second.append(Piece("same" if tag == "equal" else "added", "".join(new[new_start:new_end])))
    return _merged(first), _merged(second)


def _cut(text: str) -> list[str]:
    return _WORDS.findall(text)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Joins changed pieces that only a space separates, so that a changed phrase is one mark and not many."""
    merged: list[Piece] = []
    for index, piece in enumerate(pieces):
        is_gap = piece.kind == "same" and piece.text.isspace() and "\n" not in piece.text
        between = bool(merged) and merged[-1].kind != "same" and index + 1 < len(pieces)
        kind = merged[-1].kind if is_gap and between else piece.kind
        if merged and merged[-1].kind == kind:
            merged[-1] = Piece(kind, merged[-1].text + piece.text)
        else:
            merged.append(Piece(kind, piece.text))
    return merged
