r"""Pairs whose sides have several turns, of which every assistant turn is learnt.

The sides differ from some message on, often a tool call on one side. `jdpo.data.tokens.turns` makes one sequence of
each side; the prompt is what the two sequences share before the first token to learn:

    user Rain? assistant | <call> look </call> <end> tool 18 assistant It rains. <end>      chosen
    0    0     0         | 1      1    1       1     0    0  0         1  1      1
    user Rain? assistant | No. <end>                                                        rejected
    0    0     0         | 1   1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.row_building import EMPTY_SIDE
from jdpo.data.schemas.turn_marks import is_learnt
from jdpo.data.tokens.boundaries import RowTexts, TokenSplit, split_rows, with_settled_calls
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.data.tokens.turns import NOT_LEARNT, Masked, learnt_places, merged, turn_notes
from jdpo.types import Message, PreferenceRow

WRITTEN_DIFFERENTLY = "sides of several turns, of which the chat template writes earlier ones differently"


class MaskedSplit(NamedTuple):
    """Token ids of a prompt and of the two completions that follow it, with masks of the learnt tokens."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]
    notes: tuple[str, ...]


def whole_split(split: TokenSplit) -> MaskedSplit:
    """Returns a split in which every token of the completions is learnt."""
    return MaskedSplit(
        split.prompt, split.completions, [[True] * len(completion) for completion in split.completions], split.notes
    )


def has_several_turns(row: PreferenceRow) -> bool:
    """Returns whether a side of a pair has more than one message."""
    return any(not isinstance(side, str) and len(side) != 1 for side in (row.chosen, row.rejected))


def split_pair_turns(rows: Sequence[PreferenceRow], tokenizer: Tokenizer) -> list[MaskedSplit | Dropped]:
    """Splits pairs of conversations whose sides have several turns.

    A turn marked as shown only is not learnt; a pair whose final turn is marked so is dropped. An earlier turn that
    cannot be learnt is left out and noted. A pair is dropped if the chat template writes earlier turns differently once
    later ones follow, because each side of a pair must be one sequence.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    found = [_turns(row, tokenizer) for row in rows]
    parts = [one for turns in found if isinstance(turns, _Turns) for one in turns.parts]
    splits = iter(split_rows(parts, tokenizer))
    return [
        turns if isinstance(turns, Dropped) else _joined(row, turns, [next(splits) for _ in turns.parts])
        for row, turns in zip(rows, found, strict=True)
    ]


class _Turns(NamedTuple):
    """The turns of both sides that are learnt.

    Attributes:
      parts: one per turn. If both sides start with a learnt turn, one part holds both, since they share the prompt.
      sides: the indices into `parts` of each side.
      is_joint: whether the first part holds the first turns of both sides.
    """

    parts: list[RowTexts]
    sides: list[list[int]]
    is_joint: bool


def _turns(row: PreferenceRow, tokenizer: Tokenizer) -> _Turns | Dropped:
    prompt, *sides = (_messages(text) for text in (row.prompt, row.chosen, row.rejected))
    if not all(sides):
        return Dropped(EMPTY_SIDE, row.origin)
    if not all(is_learnt(side[-1]) for side in sides):
        return Dropped(NOT_LEARNT, row.origin)
    places = [learnt_places(side) for side in sides]
    settled = with_settled_calls(RowTexts(prompt, tuple(sides), row.origin, row.tools, row.template_kwargs), tokenizer)
    if isinstance(settled, Dropped):
        return settled
    prompt, *sides = (_messages(text) for text in (settled.prompt, *settled.completions))
    # If both sides start with a learnt turn, the two turns have the same prompt and are split together, like an
    # ordinary pair.
    is_joint = all(own[0] == 0 for own in places)
    parts, numbers = [], []
    if is_joint:
        parts.append(RowTexts(prompt, tuple(side[:1] for side in sides), row.origin, row.tools, row.template_kwargs))
    for side, own in zip(sides, places, strict=True):
        # The first turn of each side is already part 0.
        rest = own[1:] if is_joint else own
        numbers.append([*([0] if is_joint else []), *range(len(parts), len(parts) + len(rest))])
        parts += [
            RowTexts([*prompt, *side[:i]], (side[i : i + 1],), row.origin, row.tools, row.template_kwargs) for i in rest
        ]
    return _Turns(parts, numbers, is_joint)


def _messages(text: object) -> list[Message]:
    assert isinstance(text, list)
    return text


def _joined(row: PreferenceRow, turns: _Turns, splits: Sequence[TokenSplit | Dropped]) -> MaskedSplit | Dropped:
    sequences: list[Masked] = []
    for number, messages in enumerate((_messages(row.chosen), _messages(row.rejected))):
        own = list(_side_splits(turns, splits, number))
        if isinstance(own[-1], Dropped):
            return own[-1]
        found = merged([split for split in own if isinstance(split, TokenSplit)])
        # The template writes a turn differently once others follow, so the side is not one sequence.
        if len(found) > 1:
            return Dropped(WRITTEN_DIFFERENTLY, row.origin)
        sequences.append(found[0]._replace(notes=(*found[0].notes, *turn_notes(messages, own))))
    first, second = (sequence.tokens for sequence in sequences)
    # The prompt ends before the first learnt token of either side, and where the sides first differ.
    start = min(sequence.mask.index(True) for sequence in sequences)
    length = next((i for i in range(min(start, len(first), len(second))) if first[i] != second[i]), start)
    return MaskedSplit(
        first[:length],
        [sequence.tokens[length:] for sequence in sequences],
        [sequence.mask[length:] for sequence in sequences],
        tuple(dict.fromkeys(note for sequence in sequences for note in sequence.notes)),
    )


def _side_splits(turns: _Turns, splits: Sequence[TokenSplit | Dropped], side: int) -> Iterator[TokenSplit | Dropped]:
    """Yields the splits of one side; of the part that holds both sides, the side's own completion."""
    for number in turns.sides[side]:
        split = splits[number]
        if turns.is_joint and number == 0 and isinstance(split, TokenSplit):
            split = split._replace(completions=[split.completions[side]])
        yield split
