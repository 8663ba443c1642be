"""Tokenization of rows to at most `max_length` tokens, with notes on what was done to each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.turn_marks import is_learnt
from jdpo.data.tokens.boundaries import EMPTY_PROMPT, IDENTICAL_SIDES, RowTexts, TokenSplit, split_rows
from jdpo.data.tokens.pair_turns import MaskedSplit, has_several_turns, split_pair_turns, whole_split
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.data.tokens.turns import NOT_LEARNT, Masked, split_turns, whole_sequence
from jdpo.types import (
    AnyPair,
    CompletionRow,
    MaskedPair,
    PreferenceRow,
    TokenizedCompletion,
    TokenizedPair,
)

LossOn = Literal["completion", "assistant_turns"]

IDENTICAL_AFTER_CUT = "identical sides once truncated"
LONG_PROMPT = "prompt as long as max_length"
NO_COMPLETION = "no completion tokens left"

COMPLETION_CUT = "with a completion cut at max_length"
PROMPT_CUT = "with a prompt cut at max_prompt_length"
NO_TURNS = "in plain text, which has no turns: of them loss_on: assistant_turns learns the completion"


class KeptPair(NamedTuple):
    """A pair to train on, with the names under which it is counted."""

    row: AnyPair
    notes: tuple[str, ...]


class KeptCompletion(NamedTuple):
    """A supervised example to train on, with the names under which it is counted."""

    row: TokenizedCompletion
    notes: tuple[str, ...]


def tokenize_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    every_turn: bool = False,
) -> list[KeptPair | Dropped]:
    """Tokenizes preference rows.

    The prompt is truncated on the left to `max_prompt_length` tokens (BOS stays). Then each completion is truncated on
    the right so that the sequence has at most `max_length` tokens; a truncated completion ends without EOS.

    Args:
      rows: the rows.
      tokenizer: needs a chat template if rows are conversations.
      max_length: maximum number of tokens of a sequence.
      max_prompt_length: maximum number of tokens of the prompt; None: no limit.
      every_turn: sides may have several turns, and every assistant turn is learnt; the rows are then `MaskedPair`s.
        For plain text, the completion is learnt, which is noted.

    Returns:
      One result per row, in their order.

    Raises:
      ValueError: a row is a conversation and the tokenizer has no chat template.
    """
    several = [every_turn and has_several_turns(row) for row in rows]
    # Rows are tokenized in batches by kind, and put back into their order below.
    turns = iter(split_pair_turns([row for row, many in zip(rows, several, strict=True) if many], tokenizer))
    single = [
        RowTexts(row.prompt, (row.chosen, row.rejected), row.origin, row.tools, row.template_kwargs)
        for row, many in zip(rows, several, strict=True)
        if not many
    ]
    splits = iter(_split_learnt(single, tokenizer))
    results: list[KeptPair | Dropped] = []
    for row, many in zip(rows, several, strict=True):
        split = next(turns) if many else next(splits)
        if isinstance(split, TokenSplit):
            split = whole_split(split)
        if isinstance(split, Dropped):
            results.append(split)
            continue
        if every_turn and isinstance(row.prompt, str):
            split = split._replace(notes=(*split.notes, NO_TURNS))
        fitted = _fit_pair(split, row, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        if not every_turn and isinstance(fitted, KeptPair):
            # Without every_turn all completion tokens are learnt, and rows need no masks.
            pair = fitted.row
            plain = TokenizedPair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.origin)
            fitted = fitted._replace(row=plain)
        results.append(fitted)
    return results


def tokenize_completions(
    rows: Sequence[CompletionRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[KeptCompletion | Dropped]:
    """Tokenizes supervised rows, of which the completion is learnt; truncates them as `tokenize_pairs` does.

    Args:
      rows: the rows.
      tokenizer: needs a chat template if rows are conversations.
      max_length: maximum number of tokens of a sequence.
      max_prompt_length: maximum number of tokens before the final assistant turn.

    Returns:
      One result per row, in their order.

    Raises:
      ValueError: a row is a conversation and the tokenizer has no chat template.
    """
    splits = _split_learnt(
        [RowTexts(row.prompt, (row.completion,), row.origin, row.tools, row.template_kwargs) for row in rows], tokenizer
    )
    return [
        split
        if isinstance(split, Dropped)
        else _fit_completion(
            whole_sequence(split),
            row.origin,
            tokenizer,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
        )
        for row, split in zip(rows, splits, strict=True)
    ]


def tokenize_turns(
    rows: Sequence[CompletionRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[list[KeptCompletion | Dropped]]:
    """Tokenizes supervised rows, of which every assistant turn is learnt; see `jdpo.data.tokens.turns`.

    For plain text, the completion is learnt, which is noted.

    Args:
      rows, tokenizer, max_length: see `tokenize_completions`.
      max_prompt_length: maximum number of tokens before the last turn of a sequence.

    Returns:
      For each row, one result per sequence, at least one.

    Raises:
      ValueError: see `tokenize_completions`.
    """
    lengths: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    texts = iter(tokenize_completions([row for row in rows if isinstance(row.prompt, str)], tokenizer, **lengths))
    turns = iter(split_turns([row for row in rows if not isinstance(row.prompt, str)], tokenizer))
    results: list[list[KeptCompletion | Dropped]] = []
    for row in rows:
        if isinstance(row.prompt, str):
            text = next(texts)
            results.append([text if isinstance(text, Dropped) else text._replace(notes=(*text.notes, NO_TURNS))])
            continue
        found = next(turns)
        sequences = [found] if isinstance(found, Dropped) else found
        results.append(
            [
                one if isinstance(one, Dropped) else _fit_completion(one, row.origin, tokenizer, **lengths)
                for one in sequences
            ]
        )
    return results


def _split_learnt(rows: Sequence[RowTexts], tokenizer: Tokenizer) -> list[TokenSplit | Dropped]:
    """Splits rows, and drops those with an answer marked as shown only."""
    learnt = [all(isinstance(side, str) or is_learnt(side[-1]) for side in row.completions if side) for row in rows]
    splits = iter(split_rows([row for row, is_kept in zip(rows, learnt, strict=True) if is_kept], tokenizer))
    return [
        next(splits) if is_kept else Dropped(NOT_LEARNT, row.origin) for row, is_kept in zip(rows, learnt, strict=True)
    ]


def _fit_pair(
    split: MaskedSplit, row: PreferenceRow, tokenizer: Tokenizer, *, max_length: int, max_prompt_length: int | None
) -> KeptPair | Dropped:
    # The prompt first: tokens that it loses are left for the completions.
    kept = _cut_prompt(split.prompt, len(split.prompt), max_prompt_length, tokenizer)
    prompt = [split.prompt[i] for i in kept]
    budget = max_length - len(prompt)
    # Not below 0, which would cut from the end; a prompt that leaves nothing is dropped below.
    chosen, rejected = (completion[: max(budget, 0)] for completion in split.completions)
    masks = [mask[: max(budget, 0)] for mask in split.masks]
    if not prompt:
        return Dropped(EMPTY_PROMPT, row.origin)
    if budget <= 0:
        return Dropped(LONG_PROMPT, row.origin)
    # Truncation left a side without a learnt token.
    if not all(map(any, masks)):
        return Dropped(NO_COMPLETION, row.origin)
    # Equal sides have no preference; long sides may only become equal by truncation.
    if chosen == rejected:
        same = split.completions[0] == split.completions[1]
        return Dropped(IDENTICAL_SIDES if same else IDENTICAL_AFTER_CUT, row.origin)
    notes = split.notes
    if len(prompt) < len(split.prompt):
        notes += (PROMPT_CUT,)
    if any(len(completion) > budget for completion in split.completions):
        notes += (COMPLETION_CUT,)
    first, second = (np.array(mask, bool) for mask in masks)
    return KeptPair(MaskedPair(_int32(prompt), _int32(chosen), _int32(rejected), first, second, row.origin), notes)


def _fit_completion(
    found: Masked,
    origin: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None,
) -> KeptCompletion | Dropped:
    kept = _cut_prompt(found.tokens, found.prompt_length, max_prompt_length, tokenizer)
    indices = [*kept, *range(found.prompt_length, len(found.tokens))]
    tokens = [found.tokens[i] for i in indices][:max_length]
    mask = [False, *(found.mask[i] for i in indices[1:max_length])]  # nothing predicts the first token
    if not found.prompt_length:
        return Dropped(EMPTY_PROMPT, origin)
    if not any(mask):
        return Dropped(LONG_PROMPT if len(kept) >= max_length else NO_COMPLETION, origin)
    notes = found.notes
    if len(kept) < found.prompt_length:
        notes += (PROMPT_CUT,)
    if len(indices) > max_length:
        notes += (COMPLETION_CUT,)
    return KeptCompletion(TokenizedCompletion(_int32(tokens), np.array(mask, bool), origin), notes)


def _cut_prompt(ids: Sequence[int], length: int, most: int | None, tokenizer: Tokenizer) -> list[int]:
    """Returns the positions that a prompt of `length` tokens keeps: the last ones, and BOS."""
    if most is None or length <= most:
        return list(range(length))
    # Models expect BOS at the start, also of a prompt that was truncated on the left.
    if ids[0] == tokenizer.hf.bos_token_id:
        return [0, *range(length - most + 1, length)]
    return list(range(length - most, length))


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
