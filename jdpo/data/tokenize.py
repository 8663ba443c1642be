r"""Rows as token ids: the chat template, where the completion starts, truncation.

A conversation is rendered and tokenized as a whole. Its completion starts where the tokens of the prompt with the
generation prompt and of the whole conversation part, and takes in the end of turn and what stands behind it:

    <|im_start|>user \n Hi <|im_end|> \n <|im_start|>assistant \n | Hello <|im_end|> \n
    0            0    0 0  0          0  0            0         0 | 1     1          1     completion_mask

Plain text is tokenized apart, so that nothing merges across the boundary, and joined:

    <bos> The capital of France is | Paris <eos>
    0     0   0       0  0      0  | 1     1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jdpo.data.formats import EMPTY_SIDE, Dropped
from jdpo.data.tokenizer import Tokenizer
from jdpo.types import (
    CompletionRow,
    Message,
    PreferenceRow,
    Text,
    TokenizedCompletion,
    TokenizedPair,
)

LossOn = Literal["completion", "assistant_turns"]

IDENTICAL_SIDES = "identical sides"
IDENTICAL_AFTER_CUT = "identical sides once truncated"
EMPTY_PROMPT = "empty prompt"
LONG_PROMPT = "prompt as long as max_length"
NO_COMPLETION = "no completion tokens left"
REFUSED = "refused by the chat template"
NO_TOKEN_PREFIX = "turns that the chat template writes differently as the conversation goes on"

COMPLETION_CUT = "with a completion cut at max_length"
PROMPT_CUT = "with a prompt cut at max_prompt_length"
SHORTER_PREFIX = "with a prompt shortened to the tokens it shares with the conversation"
WOULD_MERGE = "whose prompt and completion would be other tokens if tokenized together"


class KeptPair(NamedTuple):
    """A pair to train on, and in words that are counted what was done to it."""

    row: TokenizedPair
    notes: tuple[str, ...]


class KeptCompletion(NamedTuple):
    """A supervised example to train on, and in words that are counted what was done to it."""

    row: TokenizedCompletion
    notes: tuple[str, ...]


def tokenize_pair(
    row: PreferenceRow, tokenizer: Tokenizer, *, max_length: int, max_prompt_length: int | None = None
) -> KeptPair | Dropped:
    """Tokenizes one preference row; see `tokenize_pairs`."""
    return tokenize_pairs([row], tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)[0]


def tokenize_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[KeptPair | Dropped]:
    """Tokenizes preference rows.

    The prompt loses tokens on the left beyond `max_prompt_length` (BOS stays), then each completion on the right
    beyond `max_length` tokens of the sequence; a completion that is cut ends without EOS.

    Returns:
      One result a row, in their order.

    Raises:
      ValueError: a row is a conversation and the tokenizer has no chat template.
    """
    splits = _split([(row.prompt, (row.chosen, row.rejected), row.origin) for row in rows], tokenizer)
    return [
        split
        if isinstance(split, Dropped)
        else _fit_pair(split, row, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        for row, split in zip(rows, splits, strict=True)
    ]


def tokenize_completion(
    row: CompletionRow,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: LossOn = "completion",
) -> KeptCompletion | Dropped:
    """Tokenizes one supervised row; see `tokenize_completions`."""
    return tokenize_completions(
        [row], tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, loss_on=loss_on
    )[0]


def tokenize_completions(
    rows: Sequence[CompletionRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: LossOn = "completion",
) -> list[KeptCompletion | Dropped]:
    """Tokenizes supervised rows; truncation is that of `tokenize_pairs`.

    Args:
      rows: what to tokenize.
      tokenizer: with a chat template where rows are conversations.
      max_length: most tokens of a sequence.
      max_prompt_length: most tokens before the final assistant turn.
      loss_on: the mask covers the final assistant turn, or every assistant turn of the conversation.

    Raises:
      ValueError: a row is a conversation and the tokenizer has no chat template.
    """
    every_turn = [loss_on == "assistant_turns" and not isinstance(row.prompt, str) for row in rows]
    splits = iter(
        _split(
            [
                (r.prompt, (r.completion,), r.origin)
                for r, every in zip(rows, every_turn, strict=True)
                if not every
            ],
            tokenizer,
        )
    )
    results: list[KeptCompletion | Dropped] = []
    for row, every in zip(rows, every_turn, strict=True):
        found = _split_turns(row, tokenizer) if every else _whole(next(splits))
        results.append(
            found
            if isinstance(found, Dropped)
            else _fit_completion(found, row, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        )
    return results


class _Split(NamedTuple):
    """Token ids of a prompt and of the completions that follow it."""

    prompt: list[int]
    completions: list[list[int]]
    notes: tuple[str, ...]


class _Masked(NamedTuple):
    """Token ids of one whole sequence, the mask of what is learnt, and where the final turn starts."""

    tokens: list[int]
    mask: list[bool]
    prompt_length: int
    notes: tuple[str, ...]


_Parts = tuple[Text, tuple[Text, ...], str]
"""Prompt, completions, origin."""


def _split(rows: Sequence[_Parts], tokenizer: Tokenizer) -> list[_Split | Dropped]:
    """Tokenizes rows of both kinds, each kind in one call, which runs on all cores."""
    results: list[_Split | Dropped | None] = [_unusable(row) for row in rows]
    for is_text, split in ((True, _split_texts), (False, _split_conversations)):
        indices = [i for i, row in enumerate(rows) if results[i] is None and isinstance(row[0], str) == is_text]
        for index, result in zip(indices, split([rows[i] for i in indices], tokenizer), strict=True):
            results[index] = result
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _unusable(row: _Parts) -> Dropped | None:
    prompt, completions, origin = row
    if any(not _words(completion).strip() for completion in completions):
        return Dropped(EMPTY_SIDE, origin)
    if len(completions) == 2 and completions[0] == completions[1]:
        return Dropped(IDENTICAL_SIDES, origin)
    if not prompt and not isinstance(prompt, str):
        return Dropped(EMPTY_PROMPT, origin)
    return None


def _words(text: Text) -> str:
    return text if isinstance(text, str) else "".join(message["content"] for message in text)


def _split_texts(rows: Sequence[_Parts], tokenizer: Tokenizer) -> Iterator[_Split]:
    prompts = tokenizer.encode([str(prompt) for prompt, _, _ in rows])
    pairs = [(str(prompt), str(text)) for prompt, completions, _ in rows for text in completions]
    apart = iter(tokenizer.encode_completions([text for _, text in pairs]))
    together = iter(tokenizer.encode([prompt + text for prompt, text in pairs]))
    for (_, completions, _), prompt in zip(rows, prompts, strict=True):
        ids = [next(apart) for _ in completions]
        merges = [prompt + completion for completion in ids] != [next(together) for _ in ids]
        yield _Split(
            _with_bos(prompt, tokenizer),
            [_with_eos(completion, tokenizer) for completion in ids],
            (WOULD_MERGE,) if merges else (),
        )


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _split_conversations(rows: Sequence[_Parts], tokenizer: Tokenizer) -> Iterator[_Split | Dropped]:
    rendered = [_render_row(row, tokenizer) for row in rows]
    encoded = iter(
        _encode_rendered([text for texts in rendered if isinstance(texts, list) for text in texts], tokenizer)
    )
    for texts in rendered:
        if isinstance(texts, Dropped):
            yield texts
            continue
        prompt, *sequences = [next(encoded) for _ in texts]
        length = min(_shared(prompt, sequence) for sequence in sequences)
        notes = (SHORTER_PREFIX,) if length < len(prompt) else ()
        yield _Split(prompt[:length], [sequence[length:] for sequence in sequences], notes)


def _render_row(row: _Parts, tokenizer: Tokenizer) -> list[str] | Dropped:
    """The prompt with the generation prompt, and with each of the completions."""
    prompt, completions, origin = row
    conversations = [_conversation(prompt), *(_conversation(prompt) + _conversation(c) for c in completions)]
    return _render(conversations, [True] + [False] * len(completions), tokenizer, origin)


def _conversation(text: Text) -> list[Message]:
    assert not isinstance(text, str)
    return text


def _render(
    conversations: Sequence[list[Message]], prompts: Sequence[bool], tokenizer: Tokenizer, origin: str
) -> list[str] | Dropped:
    import jinja2

    if not tokenizer.has_chat_template:
        raise ValueError(
            f"{origin} is a conversation, but the tokenizer in {tokenizer.source} has no chat template: set "
            "chat_template: chatml (built in), or give a Jinja file there"
        )
    try:
        return [
            tokenizer.render(conversation, add_generation_prompt=is_prompt)
            for conversation, is_prompt in zip(conversations, prompts, strict=True)
        ]
    except jinja2.TemplateError as error:
        return Dropped(REFUSED, origin, str(error))


def _encode_rendered(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Templates write BOS themselves; where it stands twice, one is taken away."""
    bos = tokenizer.hf.bos_token_id
    sequences = tokenizer.encode(texts)
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in sequences]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same.

    >>> _shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _whole(split: _Split | Dropped) -> _Masked | Dropped:
    if isinstance(split, Dropped):
        return split
    (completion,) = split.completions
    mask = [False] * len(split.prompt) + [True] * len(completion)
    return _Masked(split.prompt + completion, mask, len(split.prompt), split.notes)


def _split_turns(row: CompletionRow, tokenizer: Tokenizer) -> _Masked | Dropped:
    """Finds every assistant turn: what its tokens add to those of the conversation before it."""
    unusable = _unusable((row.prompt, (row.completion,), row.origin))
    if unusable is not None:
        return unusable
    messages = _conversation(row.prompt) + _conversation(row.completion)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if turns[0] == 0:
        return Dropped(NO_TOKEN_PREFIX, row.origin, "the assistant speaks first")
    parts = [part for i in turns for part in (messages[:i], messages[: i + 1])]
    texts = _render(parts, [True, False] * len(turns), tokenizer, row.origin)
    if isinstance(texts, Dropped):
        return texts
    ids = _encode_rendered(texts, tokenizer)
    tokens = ids[-1]
    mask = [False] * len(tokens)
    for before, after in zip(ids[::2], ids[1::2], strict=True):
        if after[: len(before)] != before or tokens[: len(after)] != after:
            return Dropped(NO_TOKEN_PREFIX, row.origin)
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return _Masked(tokens, mask, len(ids[-2]), ())


def _fit_pair(
    split: _Split, row: PreferenceRow, tokenizer: Tokenizer, *, max_length: int, max_prompt_length: int | None
) -> KeptPair | Dropped:
    kept = _cut_prompt(split.prompt, len(split.prompt), max_prompt_length, tokenizer)
    prompt = [split.prompt[i] for i in kept]
    room = max_length - len(prompt)
    chosen, rejected = (completion[:room] if room > 0 else [] for completion in split.completions)
    if not prompt:
        return Dropped(EMPTY_PROMPT, row.origin)
    if room <= 0:
        return Dropped(LONG_PROMPT, row.origin)
    if not chosen or not rejected:
        return Dropped(NO_COMPLETION, row.origin)
    if chosen == rejected:
        same = split.completions[0] == split.completions[1]
        return Dropped(IDENTICAL_SIDES if same else IDENTICAL_AFTER_CUT, row.origin)
    notes = split.notes
    if len(prompt) < len(split.prompt):
        notes += (PROMPT_CUT,)
    if any(len(completion) > room for completion in split.completions):
        notes += (COMPLETION_CUT,)
    return KeptPair(TokenizedPair(_int32(prompt), _int32(chosen), _int32(rejected), row.origin), notes)


def _fit_completion(
    found: _Masked,
    row: CompletionRow,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None,
) -> KeptCompletion | Dropped:
    kept = _cut_prompt(found.tokens, found.prompt_length, max_prompt_length, tokenizer)
    indices = [*kept, *range(found.prompt_length, len(found.tokens))]
    tokens = [found.tokens[i] for i in indices][:max_length]
    mask = [found.mask[i] for i in indices][:max_length]
    if not found.prompt_length:
        return Dropped(EMPTY_PROMPT, row.origin)
    if not any(mask):
        return Dropped(LONG_PROMPT if len(kept) >= max_length else NO_COMPLETION, row.origin)
    notes = found.notes
    if len(kept) < found.prompt_length:
        notes += (PROMPT_CUT,)
    if len(indices) > max_length:
        notes += (COMPLETION_CUT,)
    return KeptCompletion(TokenizedCompletion(_int32(tokens), np.array(mask, bool), row.origin), notes)


def _cut_prompt(ids: Sequence[int], length: int, most: int | None, tokenizer: Tokenizer) -> list[int]:
    """Which positions of a prompt of `length` tokens stay: the last ones, and BOS."""
    if most is None or length <= most:
        return list(range(length))
    if ids[0] == tokenizer.hf.bos_token_id:
        return [0, *range(length - most + 1, length)]
    return list(range(length - most, length))


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
