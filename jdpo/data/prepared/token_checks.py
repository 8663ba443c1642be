r"""Checks that tokenized rows have BOS and end tokens where a model expects them.

    <bos> Hi there . <user_ends> | Hello <end> \n       BOS first and nowhere else; one end token, followed only by what
                                                        the template writes after it: here `\n`, so `closing` is 2

The checks change no row. Faults are counted, with the first row of each. A truncated completion has no end token, which
is not a fault.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdpo.data.prepared.row_arrays import RowArrays
from jdpo.data.templates.chat_template import RenderingTooSlow
from jdpo.data.templates.template_probe import TURNS
from jdpo.data.tokens.prompt_end import PROMPT_SHORTENED, end_text, without_header
from jdpo.data.tokens.tokenizer import Tokenizer

NO_BOS = "that start without the BOS which the tokenizer puts before plain text"
BOS_TWICE = "that start with BOS twice"
BOS_INSIDE = "with BOS once more inside the sequence"
STARTS_WITH_BOS = "with a completion that starts with BOS"
NO_END = "with an answer that no end-of-turn token closes"
END_TWICE = "with an end token twice at the end of a completion"
END_INSIDE = "with an end token inside a completion"

FAULTS = (NO_BOS, BOS_TWICE, BOS_INSIDE, STARTS_WITH_BOS, NO_END, END_TWICE, END_INSIDE)
"""Names under which faults are counted."""


class Expected(NamedTuple):
    """The tokens that the checks expect.

    Attributes:
      first: the BOS that the tokenizer puts before plain text, or None.
      bos: the token that is allowed only at the start, or None. It is None if the BOS is also the EOS (GPT-2), or if
        the chat template writes it before every turn (SmolLM2): then its position is no evidence of a fault.
      ends: tokens that end an answer.
      closing: number of tokens with which the chat template closes an answer, counted from the end token; 0 if it
        writes no end token.
    """

    first: int | None
    bos: int | None
    ends: tuple[int, ...]
    closing: int


@functools.lru_cache(maxsize=2)
def expected_of(tokenizer: Tokenizer) -> Expected:
    """Returns what the checks expect of a tokenizer's rows, found by rendering a conversation."""
    ends, bos = tokenizer.end_token_ids, tokenizer.hf.bos_token_id
    (one,), (two,) = (_ids(tokenizer, TURNS * count) for count in (1, 2))
    # The first end token that is not already in the question alone closes the answer.
    places = [place for place, token in enumerate(one) if token in ends]
    question = _ids(tokenizer, TURNS[:1])[0]
    # If the template refuses the question alone, the last end token is taken to close the answer.
    closing = next((len(one) - place for place in places if place >= (len(question) or places[-1])), 0)
    # Plain text ends with EOS alone.
    if not tokenizer.has_chat_template or not one:
        closing = 1
    # A BOS within the rendered conversation is the template's way, not a fault of the rows.
    usual = isinstance(bos, int) and bos not in ends and bos not in two[1:]
    return Expected(tokenizer.bos_token_id, bos if usual and isinstance(bos, int) else None, ends, closing)


def _ids(tokenizer: Tokenizer, turns: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Returns [token ids of a conversation], or [[]] if there is no template or it refuses the conversation."""
    if not tokenizer.has_chat_template:
        return [[]]
    try:
        asked = tokenizer.probe.render(turns[:-1] or turns, add_generation_prompt=True)
        text = tokenizer.probe.render(turns)
    except RenderingTooSlow as error:
        raise ValueError(str(error)) from None
    except Exception:  # a template raises whatever its expressions raise; refused rows are counted elsewhere
        return [[]]
    return tokenizer.encode([without_header(text, asked, turns[-1]["content"], end_text(tokenizer))])


class Segments(NamedTuple):
    """Segments of a flat array of tokens, one per row, from `start` to `stop`: int64 [rows] each."""

    tokens: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def number_of(self, ids: Sequence[int], *, skip: Any = 0, leave: Any = 0) -> np.ndarray:
        """Counts the tokens of each segment that are in `ids`, except its first `skip` and last `leave`: [rows]."""
        # One cumulative sum over all tokens answers the question for every segment.
        up_to = np.concatenate([[0], np.isin(self.tokens, ids).cumsum()])
        stop = np.maximum(self.stop - leave, self.start)
        counts: np.ndarray = up_to[stop] - up_to[np.minimum(self.start + skip, stop)]
        return counts

    def token(self, place: Any) -> np.ndarray:
        """Returns the token at an index of each segment (negative: from its end), -1 if out of range: [rows]."""
        at = np.where(np.asarray(place) < 0, self.stop, self.start) + place
        inside = (at >= self.start) & (at < self.stop)
        # Places out of range read the -1 at the end.
        padded = np.append(self.tokens, -1)
        found: np.ndarray = np.where(inside, padded[np.where(inside, at, len(self.tokens))], -1)
        return found


def find_faults(
    block: RowArrays, expected: Expected, *, plain: np.ndarray, cut: np.ndarray, max_length: int
) -> dict[str, np.ndarray]:
    """Finds the rows that have a fault.

    Args:
      plain: bool [rows], whether the row is plain text, which ends in EOS; others end as the template says.
      cut: bool [rows], whether a completion was truncated.
      max_length: the length at which completions were truncated.

    Returns:
      {name of a fault: bool [rows]} for the faults that occur.
    """
    prompt, sides = _parts(block)
    length = prompt.stop - prompt.start
    closing = np.where(plain, 1, expected.closing)
    found: dict[str, np.ndarray] = {}

    def add(name: str, rows: np.ndarray) -> None:
        found[name] = found.get(name, False) | rows

    if expected.first is not None:
        add(NO_BOS, prompt.token(0) != expected.first)
    if expected.bos is not None:
        # "Twice at the start" is a fault of its own, so "inside" skips both of them.
        twice = (prompt.token(0) == expected.bos) & (prompt.token(1) == expected.bos)
        add(BOS_TWICE, twice)
        add(BOS_INSIDE, prompt.number_of([expected.bos], skip=1 + twice) > 0)
    for whole_side, side in sides:
        if expected.bos is not None:
            add(STARTS_WITH_BOS, whole_side.token(0) == expected.bos)
            add(BOS_INSIDE, whole_side.number_of([expected.bos], skip=1) > 0)
        # Only the side that reaches max_length was truncated, not the other side of the pair.
        is_full = length + whole_side.stop - whole_side.start >= max_length
        whole = (side.stop > side.start) & ~(cut & is_full)
        # True also if truncation removed only tokens that the template writes after the end token.
        closed = (closing > 0) & (side.number_of(expected.ends) > side.number_of(expected.ends, leave=closing))
        ended = whole & closed
        last, before = side.token(-closing), side.token(-closing - 1)
        twice = ended & (last == before) & np.isin(last, expected.ends)
        add(NO_END, whole & ~ended)
        add(END_TWICE, twice)
        add(END_INSIDE, side.number_of(expected.ends, leave=np.where(closed, closing, 0)) - twice > 0)
    return {name: rows for name, rows in found.items() if rows.any()}


def _parts(block: RowArrays) -> tuple[Segments, list[tuple[Segments, Segments]]]:
    """Returns the prompts, and for each side (the whole completion, its last run of learnt tokens).

    The completion of a supervised row is its last run of learnt tokens, and its prompt all tokens before that.
    """

    def of(field: str) -> Segments:
        stop = block.lengths[field].cumsum(dtype=np.int64)
        return Segments(block.values[field], stop - block.lengths[field], stop)

    if "prompt_ids" in block.values:
        sides = [(of(f"{name}_ids"), block.values.get(f"{name}_mask")) for name in ("chosen", "rejected")]
        return of("prompt_ids"), [(side, side if mask is None else _last_run(side, mask)) for side, mask in sides]
    tokens = of("tokens")
    last = _last_run(tokens, block.values["completion_mask"])
    return tokens._replace(stop=last.start), [(last, last)]


def _last_run(tokens: Segments, mask: np.ndarray) -> Segments:
    """Returns the learnt tokens at the end of each segment; an empty segment if its last token is not learnt."""
    place = np.arange(len(mask))
    # For each place, the last place up to it that is not learnt.
    last_unlearnt = np.maximum.accumulate(np.where(mask, -1, place)) if len(mask) else place
    return tokens._replace(start=np.maximum(last_unlearnt[tokens.stop - 1] + 1, tokens.start))


def refuse_ruined(counts: Mapping[str, int], num_kept: int, examples: Mapping[str, str]) -> None:
    """Stops a run whose every row would teach the model a fault.

    Raises:
      ValueError: every row starts with BOS twice.
    """
    # Only if all rows have the fault: then it is the template's, and training on it would be wrong for sure.
    if num_kept and counts.get(BOS_TWICE, 0) == num_kept:
        raise ValueError(
            f"all {num_kept:,} rows start with BOS twice (the first: {examples[BOS_TWICE]}), which no model has seen: "
            "the chat template writes it more than once, or the text of the rows contains it; remove one of them"
        )


def warnings_of(counts: Mapping[str, int], num_kept: int, num_cut: int, tokenizer: Tokenizer) -> list[str]:
    """Returns sentences on faults that the counts alone do not explain.

    Args:
      num_cut: rows with a truncated completion.
    """
    lines = []
    if counts.get(NO_END, 0) and counts[NO_END] >= num_kept - num_cut:
        lines.append(
            "no answer ends with an end token, so the model does not learn where to stop: use a chat template that "
            "closes an answer with a special token, such as chat_template: chatml"
        )
    if counts.get(PROMPT_SHORTENED, 0):
        lines.append(
            f"{counts[PROMPT_SHORTENED]:,} of {num_kept:,} rows are trained on a context that differs from the one at "
            "inference: the chat template removes the end of its generation prompt once an answer follows"
        )
    if tokenizer.hf.pad_token_id is not None and tokenizer.hf.pad_token_id in tokenizer.end_token_ids:
        lines.append("the pad token is also an end token; this is harmless, since masks come from lengths")
    return lines
