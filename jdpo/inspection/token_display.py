"""A row token by token, as text that can be shown: nothing in it moves a cursor, hides, or turns the line around."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import AnyPair, TokenizedCompletion, completions_of

NEWLINE, SPACE, TAB = "⏎", "·", "⇥"
MOST_JOINED = 8
"""Tokens at most that are shown as one because each alone is part of a character."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
"""Unicode categories that are named instead of shown: control, format, surrogate, private use, spaces, separators."""


class Piece(NamedTuple):
    """A token, or the tokens that make up one character.

    Attributes:
      text: for showing; may hold line feeds, each behind a sign for it.
      ids: of the tokens.
      is_special: whether it is a special token, shown by its name.
    """

    text: str
    ids: tuple[int, ...]
    is_special: bool


class Segment(NamedTuple):
    """A stretch of a row that is learnt, or is not."""

    name: str
    is_learnt: bool
    num_tokens: int
    pieces: tuple[Piece, ...]


class RowView(NamedTuple):
    """A row as the model sees it.

    Attributes:
      origin: where it came from.
      row: which of the tokenized rows it is.
      segments: prompt, chosen, rejected; of a supervised row what is learnt and what is not, in turn.
    """

    origin: str
    row: int
    segments: tuple[Segment, ...]


def visible(text: str) -> str:
    r"""Text in which every character that cannot be seen is written out; line feeds stay, behind a sign.

    >>> visible("a b\n\x1b[31m\u202e!")
    'a·b⏎\n⟨U+001B⟩[31m⟨U+202E⟩!'
    """
    return "".join(map(_visible_character, text))


def one_line(text: str) -> str:
    r"""The same for text that is to stay on its line; single spaces stay as they are.

    >>> one_line("say  it\n\u200bnow")
    'say··it⏎⟨U+200B⟩now'
    """
    seen = "".join(" " if character == " " else _visible_character(character) for character in text)
    return seen.replace("\n", "").replace("  ", SPACE * 2)


def _visible_character(character: str) -> str:
    if character == "\n":
        return f"{NEWLINE}\n"
    if character == "\t":
        return TAB
    if character == " ":
        return SPACE
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in _UNSEEN else character


def view_row(row: AnyPair | TokenizedCompletion, index: int, tokenizer: Tokenizer) -> RowView:
    """Cuts a tokenized row into pieces to show."""
    parts = []
    if isinstance(row, TokenizedCompletion):
        for is_learnt, ids in _runs(row.tokens, row.completion_mask):
            parts.append(("learnt" if is_learnt else "not learnt", is_learnt, ids))
    else:
        parts.append(("prompt", False, row.prompt_ids))
        for name, (tokens, mask) in zip(("chosen", "rejected"), completions_of(row), strict=True):
            parts += [(name, is_learnt, ids) for is_learnt, ids in _runs(tokens, mask)]
    special = special_token_ids(tokenizer)
    return RowView(
        row.origin,
        index,
        tuple(
            Segment(name, is_learnt, len(ids), pieces_of(ids.tolist(), tokenizer, special))
            for name, is_learnt, ids in parts
        ),
    )


def _runs(tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
    """Stretches of tokens that are learnt, and of those that are not."""
    for is_learnt, places in groupby(range(len(tokens)), key=lambda t: bool(mask[t])):
        yield is_learnt, tokens[list(places)]


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the special tokens and of the markers that a template brought."""
    added = getattr(tokenizer.hf, "added_tokens_decoder", {})
    return frozenset({*tokenizer.hf.all_special_ids, *(index for index, token in added.items() if token.special)})


def pieces_of(ids: Sequence[int], tokenizer: Tokenizer, special: frozenset[int]) -> tuple[Piece, ...]:
    """Tokens as text. Byte-level tokenizers may split a character: its tokens are shown as one."""
    pieces, place = [], 0
    while place < len(ids):
        joined = 1
        if ids[place] in special:
            text = visible(str(tokenizer.hf.convert_ids_to_tokens(ids[place])))
        else:
            text, joined = _text_of(ids[place : place + MOST_JOINED], tokenizer, special)
        pieces.append(Piece(text, tuple(ids[place : place + joined]), ids[place] in special))
        place += joined
    return tuple(pieces)


def _text_of(ids: Sequence[int], tokenizer: Tokenizer, special: frozenset[int]) -> tuple[str, int]:
    """The text of the first of the tokens, or of the fewest that are whole characters, and how many these are."""
    token = str(tokenizer.hf.convert_ids_to_tokens(ids[0]))
    if "▁" in token:  # SentencePiece: decoding it alone would lose the space before a word
        return visible(token.replace("▁", " ")), 1
    texts: list[str] = []
    for number in range(1, len(ids) + 1):
        if ids[number - 1] in special:
            break
        texts.append(str(tokenizer.hf.decode(list(ids[:number]), clean_up_tokenization_spaces=False)))
        if "\ufffd" not in texts[-1]:
            return visible(texts[-1]), number
    return visible(texts[0]), 1
