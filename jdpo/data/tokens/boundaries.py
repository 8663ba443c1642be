r"""The boundary between prompt and completion in the tokens of a row.

A conversation is rendered and tokenized as a whole. Its completion starts after the generation prompt and includes the
end of turn and what the template writes after it (see `jdpo.data.tokens.prompt_end` for templates that do not allow
this):

    <|im_start|>user \n Hi <|im_end|> \n <|im_start|>assistant \n | Hello <|im_end|> \n
    0            0    0  0  0          0  0            0         0  | 1     1          1     completion_mask

Prompt and completion of plain text are tokenized separately, so that no token crosses the boundary, and then joined:

    <bos> The capital of France is | Paris <eos>
    0     0   0       0  0      0  | 1     1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jdpo.data.schemas.formats import EMPTY_SIDE, Dropped
from jdpo.data.tokens import call_arguments
from jdpo.data.tokens.prompt_end import Encoded, encode_conversations
from jdpo.data.tokens.row_notes import all_words, conversation_notes, has_words, text_notes
from jdpo.data.tokens.row_rendering import (
    NOT_UNICODE,
    RowTexts,
    Written,
    conversation,
    is_unicode,
    one_bos,
    render_all,
    write_row,
)
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.data.tokens.unwritten import lost_sides, unwritten_notes
from jdpo.types import Message

IDENTICAL_SIDES = "identical sides"
EMPTY_PROMPT = "empty prompt"

PLAIN_TEXT = "in plain text: the chat template is not applied to them"
WOULD_MERGE = "whose prompt and completion would be other tokens if tokenized together"


class TokenSplit(NamedTuple):
    """Token ids of a prompt and of the completions that follow it."""

    prompt: list[int]
    completions: list[list[int]]
    notes: tuple[str, ...]


def split_rows(rows: Sequence[RowTexts], tokenizer: Tokenizer) -> list[TokenSplit | Dropped]:
    """Tokenizes rows of both kinds, each kind in one call, so that the tokenizer can use all cores."""
    # Rows that cannot be used are dropped before anything is rendered, and keep their place in the results.
    usable = [_unusable(row) or with_settled_calls(row, tokenizer) for row in rows]
    results: list[TokenSplit | Dropped | None] = [row if isinstance(row, Dropped) else None for row in usable]
    for is_text, split in ((True, _split_texts), (False, _split_conversations)):
        chosen = {i: row for i, row in enumerate(usable) if isinstance(row, RowTexts) and row.is_text == is_text}
        for index, result in zip(chosen, split(list(chosen.values()), tokenizer), strict=True):
            results[index] = result
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _unusable(row: RowTexts) -> Dropped | None:
    if not all(map(has_words, row.completions)):
        return Dropped(EMPTY_SIDE, row.origin)
    if not all(is_unicode(all_words(text)) for text in (row.prompt, *row.completions)):
        return Dropped(NOT_UNICODE, row.origin)
    if len(row.completions) == 2 and row.completions[0] == row.completions[1]:
        return Dropped(IDENTICAL_SIDES, row.origin)
    if not row.prompt and not isinstance(row.prompt, str):
        return Dropped(EMPTY_PROMPT, row.origin)
    return None


def with_settled_calls(row: RowTexts, tokenizer: Tokenizer) -> RowTexts | Dropped:
    """Gives the arguments of the row's tool calls the form that the chat template expects, in all its renderings."""
    if row.is_text:
        return row

    def render(parts: Sequence[list[Message]]) -> list[str] | Dropped:
        prompt, *completions = parts
        return render_all(
            [prompt + completion for completion in completions], [False] * len(completions), row, tokenizer
        )

    parts = call_arguments.settled(
        [conversation(text) for text in (row.prompt, *row.completions)],
        row.origin,
        render,
        objects_work=lambda: call_arguments.takes_objects(tokenizer),
    )
    if isinstance(parts, Dropped):
        return parts
    prompt, *completions = parts
    if len(completions) == 2 and completions[0] == completions[1]:
        return Dropped(IDENTICAL_SIDES, row.origin)  # one side had the arguments as text, the other as an object
    return row._replace(prompt=prompt, completions=tuple(completions))


def _split_texts(rows: Sequence[RowTexts], tokenizer: Tokenizer) -> Iterator[TokenSplit]:
    prompts = tokenizer.encode([str(row.prompt) for row in rows])
    pairs = [(str(row.prompt), str(text)) for row in rows for text in row.completions]
    completions = iter(tokenizer.encode_completions([text for _, text in pairs]))
    joined = iter(tokenizer.encode([prompt + text for prompt, text in pairs]))
    always = (PLAIN_TEXT,) if tokenizer.has_chat_template else ()
    for row, prompt in zip(rows, prompts, strict=True):
        # Both iterators run over all completions of all rows, so exactly this row's are taken here.
        ids = [next(completions) for _ in row.completions]
        # Only counted. The separate tokens are used, since the boundary must be between two tokens.
        merges = [prompt + completion for completion in ids] != [next(joined) for _ in ids]
        yield TokenSplit(
            with_bos(prompt, tokenizer),
            [_with_eos(completion, tokenizer) for completion in ids],
            (
                *((*always, WOULD_MERGE) if merges else always),
                *text_notes(str(row.prompt), map(str, row.completions), tokenizer),
            ),
        )


def with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of plain text with exactly one BOS at their start, if the tokenizer writes one."""
    bos = tokenizer.bos_token_id
    return ids if bos is None else one_bos([bos, *ids], bos)


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Returns completion tokens with exactly one EOS at their end, and without a BOS at their start."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start, end = 0, len(ids)
    # The text may already end with the EOS, also several times.
    while end and ids[end - 1] == eos:
        end -= 1
    while bos is not None and start < end and ids[start] == bos:
        start += 1
    return [*ids[start:end], eos]


def _split_conversations(rows: Sequence[RowTexts], tokenizer: Tokenizer) -> Iterator[TokenSplit | Dropped]:
    written = [write_row(row, tokenizer) for row in rows]
    encoded = iter(encode_conversations([one for one in written if isinstance(one, Written)], tokenizer))
    for one in written:
        result = one if isinstance(one, Dropped) else next(encoded)
        yield result if isinstance(result, Dropped) else _split_encoded(result, tokenizer)


def _split_encoded(one: Encoded, tokenizer: Tokenizer) -> TokenSplit | Dropped:
    """Splits a conversation where its completions start, unless the template leaves nothing of them to learn."""
    row, asked, wholes = one.written
    length = one.length
    completions = [sequence[length:] for sequence in one.sequences]
    # Checked on the tokens that would be learnt, after headers were cut off and prompts rebuilt.
    lost = lost_sides(one.written, completions, tokenizer)
    if lost is not None:
        return lost
    sides = [conversation(completion) for completion in row.completions]
    notes = conversation_notes(conversation(row.prompt), sides, row.tools, [asked, *wholes], tokenizer)
    return TokenSplit(one.prompt[:length], completions, (*one.notes, *notes, *unwritten_notes(one.written)))
