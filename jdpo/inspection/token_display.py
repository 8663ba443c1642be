"""Rows token by token, as text that is safe to show: nothing in it moves a cursor, hides, or reverses a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.reports.data_summary.row_statistics import Json
from jdpo.reports.data_summary.visible_text import visible
from jdpo.types import AnyPair, TokenizedCompletion, completions_of

MOST_JOINED = 8
"""The most tokens shown as one because each alone is only part of a character."""


def view_row(row: AnyPair | TokenizedCompletion, index: int, tokenizer: Tokenizer) -> Json:
    """Returns a tokenized row as segments that are learnt or not, each cut into pieces; see `pieces_of`."""
    special = special_token_ids(tokenizer)

    def segment(name: str, learnt: bool, ids: Sequence[int]) -> Json:
        return {"name": name, "learnt": learnt, "num_tokens": len(ids), "pieces": pieces_of(ids, tokenizer, special)}

    segments = []
    if isinstance(row, TokenizedCompletion):
        for learnt, ids in _runs(row.tokens, row.completion_mask):
            segments.append(segment("learnt" if learnt else "not learnt", learnt, ids))
    else:
        segments.append(segment("prompt", False, row.prompt_ids.tolist()))
        for name, side in zip(("chosen", "rejected"), completions_of(row), strict=True):
            segments += [segment(name, learnt, ids) for learnt, ids in _runs(*side)]
    return {"origin": row.origin, "row": index, "segments": segments}


def _runs(tokens: np.ndarray, mask: np.ndarray) -> Iterator[tuple[bool, list[int]]]:
    """Yields runs of tokens that are all learnt, or all not."""
    for is_learnt, places in groupby(range(len(tokens)), key=lambda t: bool(mask[t])):
        yield is_learnt, tokens[list(places)].tolist()


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids of special tokens, those that a chat template added included."""
    added = getattr(tokenizer.hf, "added_tokens_decoder", {})
    return frozenset({*tokenizer.hf.all_special_ids, *(index for index, token in added.items() if token.special)})


def pieces_of(ids: Sequence[int], tokenizer: Tokenizer, special: frozenset[int]) -> list[Json]:
    """Returns tokens as {text, ids, special}, text being safe to show.

    A byte-level tokenizer may split a character into several tokens; these become one piece.
    """
    pieces, place = [], 0
    while place < len(ids):
        joined, is_special = 1, ids[place] in special
        if is_special:
            # Decoding could drop it or, in some tokenizers, add a space.
            text = visible(str(tokenizer.hf.convert_ids_to_tokens(ids[place])))
        else:
            text, joined = _text_of(ids[place : place + MOST_JOINED], tokenizer, special)
        pieces.append({"text": text, "ids": list(ids[place : place + joined]), "special": is_special})
        place += joined
    return pieces


def _text_of(ids: Sequence[int], tokenizer: Tokenizer, special: frozenset[int]) -> tuple[str, int]:
    """Returns the text of the fewest leading tokens that make whole characters, and how many these are."""
    token = str(tokenizer.hf.convert_ids_to_tokens(ids[0]))
    if "▁" in token:  # SentencePiece: decoding it alone would lose the space before a word
        return visible(token.replace("▁", " ")), 1
    texts: list[str] = []
    for number in range(1, len(ids) + 1):
        if ids[number - 1] in special:
            break
        texts.append(str(tokenizer.hf.decode(list(ids[:number]), clean_up_tokenization_spaces=False)))
        if "\ufffd" not in texts[-1]:  # the sign for bytes that are no character yet
            return visible(texts[-1]), number
    # No run of tokens made whole characters: the bytes are not UTF-8, so the first token is shown by itself.
    return visible(texts[0]), 1
