"""Text in which every character can be seen: spaces at odd places, line feeds and control characters have signs."""

from __future__ import annotations

import unicodedata

NEWLINE, SPACE, TAB = "⏎", "·", "⇥"

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
"""Unicode categories shown by code: control, format, surrogate, private use, spaces, separators."""


def visible(text: str) -> str:
    r"""Writes out every character that cannot be seen; line feeds stay, after a sign.

    >>> visible("a b\n\x1b[31m\u202e!")
    'a·b⏎\n⟨U+001B⟩[31m⟨U+202E⟩!'
    """
    return "".join(map(_visible_character, text))


def one_line(text: str) -> str:
    r"""Writes out every character that cannot be seen, on a single line; single spaces stay.

    >>> one_line("write  it\n\u200bnow")
    'write··it⏎⟨U+200B⟩now'
    """
    # Words stay separated by plain spaces here, so that a sentence remains readable.
    seen = "".join(" " if character == " " else _visible_character(character) for character in text)
    return seen.replace("\n", "").replace("  ", SPACE * 2)  # several spaces would look like one


def _visible_character(character: str) -> str:
    signs = {"\n": f"{NEWLINE}\n", "\t": TAB, " ": SPACE}
    if character in signs:
        return signs[character]
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in _UNSEEN else character
