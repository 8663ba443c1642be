"""Checks of the raw rows' text: which schema reads them, and characters that a reader would not see.

This reads the files a second time, because tokenized rows no longer show it: they have no schema, and a special token
spelled out in the text looks like one that the template wrote. It takes about as long as reading the file; nothing is
tokenized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jdpo.data.schemas.formats import Dropped
from jdpo.types import CompletionRow, PreferenceRow, Text

AROUND = 24
"""Characters of context on either side of a match in an excerpt."""

SPECIAL, SPECIAL_IN_PLAIN = "special_tokens", "special_tokens_in_plain_text"
CONTROL, BIDI, INVISIBLE, REPLACEMENT, SURROGATE = "control", "bidi", "invisible", "replacement", "surrogate"

CHARACTERS = {
    CONTROL: re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),  # tab, newline and carriage return are text
    BIDI: re.compile("[\u202a-\u202e\u2066-\u2069]"),
    # Joiners (U+200C, U+200D) and direction marks (U+200E, U+200F) belong to scripts and emoji.
    INVISIBLE: re.compile("[\u00ad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"),
    REPLACEMENT: re.compile("\ufffd"),
    SURROGATE: re.compile("[\ud800-\udfff]"),
}


class TextFacts(NamedTuple):
    """Findings in the raw rows of a dataset.

    Attributes:
      schemas: name of a schema -> number of raw rows that it reads.
      marks: kind of finding -> {rows, first, excerpt}: how many raw rows have it, and the first; only kinds that occur.
    """

    schemas: dict[str, int]
    marks: dict[str, dict[str, Any]]


def text_facts(
    rows: Iterable[tuple[dict[str, Any], str]],
    read: Callable[[dict[str, Any], str], Iterable[PreferenceRow | CompletionRow | Dropped]],
    schema_name: Callable[[dict[str, Any]], str],
    special: re.Pattern[str],
    progress: Callable[[int], None] | None = None,
) -> TextFacts:
    """Reads the rows of a dataset and checks their texts.

    Args:
      rows: raw rows with their origins.
      read: (raw row, origin) -> the rows that training makes of it.
      schema_name: raw row -> name of the schema that reads it.
      special: matches special tokens; see `Tokenizer.special_text`.
      progress: called with the number of raw rows read so far.

    Raises:
      ValueError: a row cannot be read.
    """
    schemas: Counter[str] = Counter()
    marks: dict[str, dict[str, Any]] = {}
    for number, (raw, origin) in enumerate(rows, 1):
        schemas[schema_name(raw)] += 1
        found: dict[str, dict[str, Any]] = {}
        for row in read(raw, origin):
            if not isinstance(row, Dropped):  # preparing the rows counts those
                for kind, excerpt in _marks_of(row, special):
                    # Several pairs of one raw row share its prompt and count once.
                    found.setdefault(kind, {"rows": 0, "first": row.origin, "excerpt": excerpt})
        for kind, mark in found.items():
            marks.setdefault(kind, mark)["rows"] += 1
        if progress is not None:
            progress(number)
    return TextFacts(dict(schemas), marks)


def _marks_of(row: PreferenceRow | CompletionRow, special: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yields (kind, excerpt) for every kind of finding in a row."""
    sides = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row.completion,)
    # One search over all texts; a newline between them, so that no match spans two.
    text = "\n".join(text for part in (row.prompt, *sides) for text in _texts(part))
    patterns = {SPECIAL_IN_PLAIN if isinstance(row.prompt, str) else SPECIAL: special, CONTROL: CHARACTERS[CONTROL]}
    if not text.isascii():  # every other kind is beyond ASCII
        patterns |= CHARACTERS
    for kind, pattern in patterns.items():
        if match := pattern.search(text):
            start, stop = max(match.start() - AROUND, 0), match.end() + AROUND
            yield kind, ("…" if start else "") + text[start:stop] + ("…" if stop < len(text) else "")


def _texts(part: Text) -> list[str]:
    if isinstance(part, str):
        return [part]
    contents = (message.get("content") for message in part)
    return [content for content in contents if isinstance(content, str)]
