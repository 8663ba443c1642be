r"""Where the completion starts in the tokens of a row.

A conversation is rendered and tokenized as a whole. Its completion starts where the tokens of the prompt with the
generation prompt and of the whole conversation part, and takes in the end of turn and what stands behind it:

    <|im_start|>user \n Hi <|im_end|> \n <|im_start|>assistant \n | Hello <|im_end|> \n
    0            0    0  0  0          0  0            0         0  | 1     1          1     completion_mask

Plain text is tokenized apart, so that nothing merges across the boundary, and joined:

    <bos> The capital of France is | Paris <eos>
    0     0   0       0  0      0  | 1     1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jdpo.data import call_arguments
from jdpo.data.formats import EMPTY_SIDE, Dropped
from jdpo.data.row_notes import all_words, conversation_notes, has_words, text_notes
from jdpo.data.tokenizer import Tokenizer
from jdpo.types import CompletionRow, Message, Text

IDENTICAL_SIDES = "identical sides"
EMPTY_PROMPT = "empty prompt"
REFUSED = "refused by the chat template"
NOT_UNICODE = "text that is not Unicode"

SHORTER_PREFIX = "with a prompt shortened to the tokens it shares with the conversation"
PLAIN_TEXT = "in plain text: the chat template is not applied to them"
WOULD_MERGE = "whose prompt and completion would be other tokens if tokenized together"


class Split(NamedTuple):
    """Token ids of a prompt and of the completions that follow it."""

    prompt: list[int]
    completions: list[list[int]]
    notes: tuple[str, ...]


class Parts(NamedTuple):
    """A row of either kind: the prompt, what may follow it, where it came from, what the conversation may call."""

    prompt: Text
    completions: tuple[Text, ...]
    origin: str
    tools: list[dict[str, Any]] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the row is plain text, not a conversation."""
        return isinstance(self.prompt, str)


def split_rows(rows: Sequence[Parts], tokenizer: Tokenizer) -> list[Split | Dropped]:
    """Tokenizes rows of both kinds, each kind in one call, which runs on all cores."""
    usable = [_unusable(row) or with_settled_calls(row, tokenizer) for row in rows]
    results: list[Split | Dropped | None] = [row if isinstance(row, Dropped) else None for row in usable]
    for is_text, split in ((True, _split_texts), (False, _split_conversations)):
        chosen = {i: row for i, row in enumerate(usable) if isinstance(row, Parts) and row.is_text == is_text}
        for index, result in zip(chosen, split(list(chosen.values()), tokenizer), strict=True):
            results[index] = result
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _unusable(row: Parts) -> Dropped | None:
    if not all(map(has_words, row.completions)):
        return Dropped(EMPTY_SIDE, row.origin)
    if not all(_is_unicode(all_words(text)) for text in (row.prompt, *row.completions)):
        return Dropped(NOT_UNICODE, row.origin)
    if len(row.completions) == 2 and row.completions[0] == row.completions[1]:
        return Dropped(IDENTICAL_SIDES, row.origin)
    if not row.prompt and not isinstance(row.prompt, str):
        return Dropped(EMPTY_PROMPT, row.origin)
    return None


def with_settled_calls(row: Parts, tokenizer: Tokenizer) -> Parts | Dropped:
    """Gives the arguments of the row's tool calls the form that the chat template writes, for all of its renderings."""
    if row.is_text:
        return row

    def render(parts: Sequence[list[Message]]) -> list[str] | Dropped:
        prompt, *completions = parts
        return _render([prompt + completion for completion in completions], [False] * len(completions), row, tokenizer)

    parts = call_arguments.settled(
        [_conversation(text) for text in (row.prompt, *row.completions)],
        row.origin,
        render,
        objects_work=lambda: call_arguments.takes_objects(tokenizer),
    )
    if isinstance(parts, Dropped):
        return parts
    prompt, *completions = parts
    if len(completions) == 2 and completions[0] == completions[1]:
        return Dropped(IDENTICAL_SIDES, row.origin)  # one side had as text what the other has as an object
    return row._replace(prompt=prompt, completions=tuple(completions))


def _is_unicode(text: str) -> bool:
    r"""Whether a tokenizer takes the text; JSON can hold half of a surrogate pair.

    >>> _is_unicode("\ud83d"), _is_unicode("\U0001f600")
    (False, True)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_texts(rows: Sequence[Parts], tokenizer: Tokenizer) -> Iterator[Split]:
    prompts = tokenizer.encode([str(row.prompt) for row in rows])
    pairs = [(str(row.prompt), str(text)) for row in rows for text in row.completions]
    apart = iter(tokenizer.encode_completions([text for _, text in pairs]))
    together = iter(tokenizer.encode([prompt + text for prompt, text in pairs]))
    always = (PLAIN_TEXT,) if tokenizer.has_chat_template else ()
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [next(apart) for _ in row.completions]
        merges = [prompt + completion for completion in ids] != [next(together) for _ in ids]
        yield Split(
            _with_bos(prompt, tokenizer),
            [_with_eos(completion, tokenizer) for completion in ids],
            (
                *((*always, WOULD_MERGE) if merges else always),
                *text_notes(str(row.prompt), map(str, row.completions), tokenizer),
            ),
        )


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids if bos is None else _one_bos([bos, *ids], bos)


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Completion tokens with EOS behind them once, and without a BOS that the text begins with."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start, end = 0, len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    while bos is not None and start < end and ids[start] == bos:
        start += 1
    return [*ids[start:end], eos]


def _split_conversations(rows: Sequence[Parts], tokenizer: Tokenizer) -> Iterator[Split | Dropped]:
    rendered = [_render_row(row, tokenizer) for row in rows]
    encoded = iter(
        _encode_rendered([text for texts in rendered if isinstance(texts, list) for text in texts], tokenizer)
    )
    for row, texts in zip(rows, rendered, strict=True):
        if isinstance(texts, Dropped):
            yield texts
            continue
        prompt, *sequences = [next(encoded) for _ in texts]
        length = min(_shared(prompt, sequence) for sequence in sequences)
        notes: tuple[str, ...] = (SHORTER_PREFIX,) if length < len(prompt) else ()
        messages = [_conversation(completion) for completion in row.completions]
        notes += conversation_notes(_conversation(row.prompt), messages, row.tools, texts, tokenizer)
        yield Split(prompt[:length], [sequence[length:] for sequence in sequences], notes)


def _render_row(row: Parts, tokenizer: Tokenizer) -> list[str] | Dropped:
    """The prompt with the generation prompt, and with each of the completions."""
    prompt = _conversation(row.prompt)
    conversations = [prompt, *(prompt + _conversation(completion) for completion in row.completions)]
    return _render(conversations, [True] + [False] * len(row.completions), row, tokenizer)


def _conversation(text: Text) -> list[Message]:
    assert not isinstance(text, str)
    return text


def _render(
    conversations: Sequence[list[Message]], prompts: Sequence[bool], row: Parts | CompletionRow, tokenizer: Tokenizer
) -> list[str] | Dropped:
    import jinja2

    origin = row.origin
    if not tokenizer.has_chat_template:
        raise ValueError(
            f"{origin} is a conversation, but the tokenizer in {tokenizer.source} has no chat template: set "
            "chat_template: chatml (built in), or give a Jinja file there"
        )
    try:
        texts = [
            tokenizer.render(conversation, tools=row.tools, add_generation_prompt=is_prompt)
            for conversation, is_prompt in zip(conversations, prompts, strict=True)
        ]
    except jinja2.TemplateError as error:
        return Dropped(REFUSED, origin, str(error))
    except Exception as error:  # an expression of the template that this row does not fit
        return Dropped(REFUSED, origin, f"{type(error).__name__}: {error}")
    # Beside the content a template may write further keys of a message.
    return texts if all(map(_is_unicode, texts)) else Dropped(NOT_UNICODE, origin)


def _encode_rendered(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Templates write BOS themselves; where it stands twice, one is taken away."""
    bos = tokenizer.hf.bos_token_id
    sequences = tokenizer.encode(texts)
    return sequences if bos is None else [_one_bos(ids, bos) for ids in sequences]


def _one_bos(ids: list[int], bos: int) -> list[int]:
    """The ids with one BOS of those that they begin with.

    >>> _one_bos([1, 1, 1, 7, 1], bos=1)
    [1, 7, 1]
    """
    extra = 0
    while ids[extra : extra + 2] == [bos, bos]:
        extra += 1
    return ids[extra:]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same.

    >>> _shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
