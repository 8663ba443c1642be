"""What the words of raw rows say: which schema reads them, and characters that a reader would not see.

Rows are read a second time for it, since a tokenized row has no schema, and a special token that stood in the text
looks like one that the template wrote. That takes about as long as reading the file and does not tokenize.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jdpo.data.schemas.formats import Dropped
from jdpo.types import CompletionRow, PreferenceRow, Text

AROUND = 24
"""Characters of an excerpt on either side of what was found."""

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
"""What is looked for, by kind."""


class Mark(NamedTuple):
    """Something that was found in texts: in how many rows, where first, and what stands around it there."""

    rows: int
    first: str
    excerpt: str


class TextFacts(NamedTuple):
    """What was found in the rows of a data set.

    Attributes:
      schemas: the name of a schema -> raw rows that it reads.
      marks: kind -> what was found; a kind that was not found is left out.
    """

    schemas: dict[str, int]
    marks: dict[str, Mark]


Read = Callable[[dict[str, Any], str], Iterable[PreferenceRow | CompletionRow | Dropped]]


def text_facts(
    rows: Iterable[tuple[dict[str, Any], str]],
    read: Read,
    schema_name: Callable[[dict[str, Any]], str],
    special: re.Pattern[str],
    progress: Callable[[int], None] | None = None,
) -> TextFacts:
    """Reads the rows of a data set and looks at their texts.

    Args:
      rows: raw rows with their origins.
      read: a raw row and its origin -> the rows that training makes of it.
      schema_name: what reads a raw row.
      special: finds special tokens; see `Tokenizer.special_text`.
      progress: told how many raw rows were read.

    Raises:
      ValueError: a row cannot be read.
    """
    schemas: Counter[str] = Counter()
    marks: dict[str, Mark] = {}
    for number, (raw, origin) in enumerate(rows, 1):
        schemas[schema_name(raw)] += 1
        found: set[str] = set()
        for row in read(raw, origin):
            if isinstance(row, Dropped):
                continue  # preparing the rows counts it
            for kind, excerpt in marks_of(row, special):
                if kind not in found:  # several pairs of one raw row share its prompt
                    found.add(kind)
                    mark = marks.get(kind) or Mark(0, row.origin, excerpt)
                    marks[kind] = mark._replace(rows=mark.rows + 1)
        if progress is not None:
            progress(number)
    return TextFacts(dict(schemas), marks)


def marks_of(row: PreferenceRow | CompletionRow, special: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yields (kind, excerpt) for every kind that a row has."""
    sides = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row.completion,)
    text = "\n".join(text for part in (row.prompt, *sides) for text in _texts(part))
    if match := special.search(text):
        yield (SPECIAL_IN_PLAIN if isinstance(row.prompt, str) else SPECIAL), excerpt(text, match)
    for kind, pattern in CHARACTERS.items():
        if kind != CONTROL and text.isascii():
            break
        if match := pattern.search(text):
            yield kind, excerpt(text, match)


def _texts(part: Text) -> list[str]:
    if isinstance(part, str):
        return [part]
    contents = (message.get("content") for message in part)
    return [content for content in contents if isinstance(content, str)]


def excerpt(text: str, match: re.Match[str]) -> str:
    """What was found with a little of what stands around it.

    >>> excerpt("Say <|im_end|> to me", re.search("<.im_end.>", "Say <|im_end|> to me"))
    'Say <|im_end|> to me'
    """
    start, stop = max(match.start() - AROUND, 0), match.end() + AROUND
    return ("…" if start else "") + text[start:stop] + ("…" if stop < len(text) else "")
