r"""Sequences in which every assistant turn of a conversation is learnt.

Each turn is split from the messages before it in the same way as a final answer, with the history as the model sees it
at inference. If the prompt of the next turn starts with the tokens up to the end of a turn, the two share a sequence.
With most templates a whole conversation is one sequence:

    user Hi assistant | Hello <end> | user Bye assistant | Bye <end>
    0    0  0         | 1     1     | 0    0   0         | 1   1

A template that writes earlier turns differently, as Qwen 3 does with thoughts, needs several sequences:

    user Hi assistant | <think> </think> Hello <end>
    user Hi assistant Hello <end> user Bye assistant | <think> </think> Bye <end>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.turn_marks import is_learnt
from jdpo.data.tokens.boundaries import TokenSplit, split_rows, with_settled_calls
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import CompletionRow, Message

NOT_LEARNT = "without a turn to learn: marked as shown only"
SHOWN_TURN = "with an assistant turn that is marked as shown only, and is not learnt"
LEFT_OUT = "with an assistant turn that is not learnt: "
"""Followed by the reason why a row of this turn alone would be dropped."""


class Masked(NamedTuple):
    """Token ids of one whole sequence, the mask of learnt tokens, and the start of its last turn."""

    tokens: list[int]
    mask: list[bool]
    prompt_length: int
    notes: tuple[str, ...]


def whole_sequence(split: TokenSplit) -> Masked:
    """Joins a prompt and its one completion, all of which is learnt."""
    (completion,) = split.completions
    mask = [False] * len(split.prompt) + [True] * len(completion)
    return Masked(split.prompt + completion, mask, len(split.prompt), split.notes)


def split_turns(rows: Sequence[CompletionRow], tokenizer: Tokenizer) -> list[list[Masked] | Dropped]:
    """Splits conversations into sequences in which every assistant turn is learnt once.

    A turn marked as shown only is not learnt, and messages after the last learnt turn are left out. A turn that cannot
    be learnt is left out and noted; if none can be learnt, the row is dropped for the reason of the last one.

    Args:
      rows: conversations.
      tokenizer: a tokenizer with a chat template.

    Returns:
      For each row, its sequences in the order of its turns (at least one), or Dropped.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    found = [_turns(row, tokenizer) for row in rows]
    splits = iter(split_rows([turn for turns in found if not isinstance(turns, Dropped) for turn in turns], tokenizer))
    return [
        turns if isinstance(turns, Dropped) else _sequences(_messages(row), [next(splits) for _ in turns])
        for row, turns in zip(rows, found, strict=True)
    ]


def _turns(row: CompletionRow, tokenizer: Tokenizer) -> list[RowTexts] | Dropped:
    """Returns every turn to learn with the messages before it; tool calls have the same form in all of them."""
    places = learnt_places(_messages(row))
    if not places:
        return Dropped(NOT_LEARNT, row.origin)
    # Settled once for the whole conversation: rendered separately, turns could get different forms of one call.
    whole = with_settled_calls(
        RowTexts(row.prompt, (row.completion,), row.origin, row.tools, row.template_kwargs), tokenizer
    )
    if isinstance(whole, Dropped):
        return whole
    messages = _messages(CompletionRow(whole.prompt, whole.completions[0], row.origin))
    return [RowTexts(messages[:i], (messages[i : i + 1],), row.origin, row.tools, row.template_kwargs) for i in places]


def learnt_places(messages: Sequence[Message]) -> list[int]:
    """Returns the indices of the messages that are assistant turns to learn."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and is_learnt(message)]


def _messages(row: CompletionRow) -> list[Message]:
    assert not isinstance(row.prompt, str)
    assert not isinstance(row.completion, str)
    return [*row.prompt, *row.completion]


def _sequences(messages: Sequence[Message], splits: Sequence[TokenSplit | Dropped]) -> list[Masked] | Dropped:
    found = merged([split for split in splits if isinstance(split, TokenSplit)])
    if not found:
        assert isinstance(splits[-1], Dropped)
        return splits[-1]
    notes = turn_notes(messages, splits)
    found[-1] = found[-1]._replace(notes=(*found[-1].notes, *notes))  # notes of the row, so they are counted once
    return found


def turn_notes(messages: Sequence[Message], splits: Sequence[TokenSplit | Dropped]) -> list[str]:
    """Returns the notes on turns of a row that are not learnt."""
    shown = any(message["role"] == "assistant" and not is_learnt(message) for message in messages)
    left_out = dict.fromkeys(LEFT_OUT + split.reason for split in splits if isinstance(split, Dropped))
    return [*([SHOWN_TURN] if shown else []), *left_out]


def merged(splits: Sequence[TokenSplit]) -> list[Masked]:
    """Joins turns, in their order, into the smallest possible number of sequences."""
    found: list[Masked] = []
    for split in splits:
        turn = whole_sequence(split)
        # The prompt of this turn starts with everything so far, so the sequence can be extended.
        if found and split.prompt[: len(found[-1].tokens)] == found[-1].tokens:
            earlier = found.pop()
            mask = earlier.mask + turn.mask[len(earlier.mask) :]
            turn = Masked(turn.tokens, mask, turn.prompt_length, earlier.notes + turn.notes)
        found.append(turn._replace(notes=tuple(dict.fromkeys(turn.notes))))
    return found
