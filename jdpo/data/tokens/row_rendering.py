"""Rendering of conversations: the only place where the chat template writes the messages of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from jdpo.data.schemas.formats import Dropped
from jdpo.data.templates.chat_template import RenderingTooSlow
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import CompletionRow, Message, Text

REFUSED = "refused by the chat template"
NOT_UNICODE = "text that is not Unicode"


class RowTexts(NamedTuple):
    """A row of either kind before it is tokenized.

    Attributes:
      prompt: plain text, or messages.
      completions: the texts or messages that may follow the prompt: two sides, or one completion.
      origin: where the row came from.
      tools: the tools that the conversation may call.
      template_kwargs: `chat_template_kwargs` of the row.
    """

    prompt: Text
    completions: tuple[Text, ...]
    origin: str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None

    @property
    def is_text(self) -> bool:
        """True for plain text, False for a conversation."""
        return isinstance(self.prompt, str)


class Written(NamedTuple):
    """A conversation as the chat template writes it.

    Attributes:
      row: the messages given to the template.
      asked: the prompt with the generation prompt, which is what a model sees at inference.
      wholes: the prompt with each of the completions.
    """

    row: RowTexts
    asked: str
    wholes: list[str]


def write_row(row: RowTexts, tokenizer: Tokenizer) -> Written | Dropped:
    """Renders the prompt and the whole conversations of a row.

    Raises:
      ValueError: the tokenizer has no chat template, or the template takes too long.
    """
    prompt = conversation(row.prompt)
    wholes = [prompt + conversation(completion) for completion in row.completions]
    texts = render_all([prompt, *wholes], [True] + [False] * len(wholes), row, tokenizer)
    return texts if isinstance(texts, Dropped) else Written(row, texts[0], texts[1:])


def write_bare(row: RowTexts, tokenizer: Tokenizer) -> str | None:
    """Renders the prompt without a generation prompt; returns None if the template refuses it."""
    try:
        return _written(conversation(row.prompt), row, tokenizer)
    except RenderingTooSlow as error:
        raise ValueError(f"{row.origin}: {error}") from None
    except Exception:  # many templates require a conversation that ends with the assistant
        return None


def write_emptied(row: RowTexts, number: int, tokenizer: Tokenizer) -> str | None:
    """Renders a whole conversation with an empty last message; returns None if the template refuses it.

    Args:
      row: the row that was given to `write_row`.
      number: index of the completion.
      tokenizer: a tokenizer with a chat template.
    """
    messages = conversation(row.prompt) + conversation(row.completions[number])
    try:
        return _written([*messages[:-1], {"role": messages[-1]["role"], "content": ""}], row, tokenizer)
    except RenderingTooSlow as error:
        raise ValueError(f"{row.origin}: {error}") from None
    except Exception:  # as in write_bare
        return None


def conversation(text: Text) -> list[Message]:
    """Returns a part of a row that is known to be messages, not text."""
    assert not isinstance(text, str)
    return text


def render_all(
    conversations: Sequence[list[Message]], prompts: Sequence[bool], row: RowTexts | CompletionRow, tokenizer: Tokenizer
) -> list[str] | Dropped:
    """Renders conversations of one row; those that are True in `prompts` get a generation prompt.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    origin = row.origin
    # Before rendering, so that a missing template is an error of the run and not a refusal of every row.
    tokenizer.check_template(row.tools, row.template_kwargs, origin)
    try:
        texts = [
            _written(messages, row, tokenizer, is_prompt=is_prompt)
            for messages, is_prompt in zip(conversations, prompts, strict=True)
        ]
    except RenderingTooSlow as error:
        raise ValueError(f"{origin}: {error}") from None
    except jinja2.TemplateError as error:
        return Dropped(REFUSED, origin, str(error))
    except Exception as error:  # an expression of the template fails for this row
        return Dropped(REFUSED, origin, f"{type(error).__name__}: {error}")
    # Checked again: a template may write other keys of a message than its content.
    return texts if all(map(is_unicode, texts)) else Dropped(NOT_UNICODE, origin)


def _written(
    messages: list[Message], row: RowTexts | CompletionRow, tokenizer: Tokenizer, *, is_prompt: bool = False
) -> str:
    return tokenizer.render(messages, tools=row.tools, add_generation_prompt=is_prompt, kwargs=row.template_kwargs)


def is_unicode(text: str) -> bool:
    r"""Returns whether a text can be encoded; JSON may contain half of a surrogate pair, which cannot.

    >>> is_unicode("\ud83d"), is_unicode("\U0001f600")
    (False, True)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_rendered(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of rendered conversations. The template writes BOS; of several at the start one is kept."""
    bos = tokenizer.hf.bos_token_id
    sequences = tokenizer.encode(texts)
    return sequences if bos is None else [one_bos(ids, bos) for ids in sequences]


def one_bos(ids: list[int], bos: int) -> list[int]:
    """Returns the ids with repeated BOS at their start reduced to one.

    >>> one_bos([1, 1, 1, 7, 1], bos=1)
    [1, 7, 1]
    """
    extra = 0
    # Stops at the last of the leading BOS, which stays.
    while ids[extra : extra + 2] == [bos, bos]:
        extra += 1
    return ids[extra:]
