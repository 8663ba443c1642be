"""The text of generated tokens: piece by piece, and as the content of a message to train on."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.messages import assistant
from jdpo.data.tokens.prompt_end import opened_thought
from jdpo.data.tokens.row_rendering import RowTexts, conversation, encode_rendered, render_all
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message

_CONTEXT = 6
"""Tokens before an answer that are decoded with it: a decoder may join tokens, or drop a space at its start."""

_OPENING = 12
"""Tokens at the end of a prompt that may open a thought."""

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are not a whole character yet."""


class PieceDecoder:
    """Decodes tokens one by one; the pieces together are the text of all tokens.

    A character whose bytes span several tokens is in the piece of the last of them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """
        Args:
          context: the tokens before, whose text is not returned.
        """
        self._tokenizer = tokenizer
        self._window = [*context[-_CONTEXT:]]
        self._done = decoded(self._window, tokenizer)

    def push(self, token: int) -> str:
        """Returns the text that one more token adds; empty within a character."""
        self._window.append(int(token))
        text = decoded(self._window, self._tokenizer)
        if text.endswith(_UNFINISHED) or len(text) < len(self._done):
            return ""
        piece, self._done = text[len(self._done) :], text
        if len(self._window) > 2 * _CONTEXT:
            # A short window, so that the work per token does not grow with the length of the answer.
            self._window = self._window[-_CONTEXT:]
            self._done = decoded(self._window, self._tokenizer)
        return piece

    def finish(self) -> str:
        """Returns the rest: bytes at the end that are no whole character, as the decoder writes them."""
        text = decoded(self._window, self._tokenizer)
        piece, self._done = text[len(self._done) :], text
        return piece


def decoded(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of tokens exactly as they are, special tokens included."""
    text = tokenizer.hf.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def text_after(context: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of tokens that follow others."""
    before = [*context[-_CONTEXT:]]
    # One call for all of them, since long answers are decoded by the thousand.
    return decoded([*before, *tokens], tokenizer)[len(decoded(before, tokenizer)) :]


def content_of(row: RowTexts, prompt_ids: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the content of a generated answer, which training renders as the same tokens where that is possible.

    It is the text of the tokens; without the whitespace before or around it if the chat template writes that
    whitespace itself. Where no form gives the same tokens, such as for words that the model spelled in another way than
    the tokenizer does, it is the text as it is.

    Args:
      row: the prompt.
      prompt_ids: its tokens.
      tokens: those of the answer, without the token that ends it.
      tokenizer: of the model.
    """
    text = text_after(prompt_ids, tokens, tokenizer)
    # Some templates write one space before the answer, others strip it.
    without_one = text[1:] if text[:1].isspace() else text
    # Some write an answer as it is, and open its thought in the prompt alone: then the content repeats the opening.
    opened = "" if row.is_text else opened_thought(decoded(prompt_ids[-_OPENING:], tokenizer))
    forms = dict.fromkeys((text, without_one, text.lstrip(), text.strip(), opened + text))
    return next((form for form in forms if gives(assistant(form), row, prompt_ids, tokens, tokenizer)), text)


def gives(
    answer: Message, row: RowTexts, prompt_ids: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer
) -> bool:
    """Returns whether training on a message would learn the tokens that were generated."""
    if row.is_text:
        (ids,) = tokenizer.encode_completions([answer["content"]])
        return ids[: len(tokens)] == [*tokens]
    texts = render_all([[*conversation(row.prompt), answer]], [False], row, tokenizer)
    if isinstance(texts, Dropped):
        return False
    (ids,) = encode_rendered(texts, tokenizer)
    return ids[: len(prompt_ids) + len(tokens)] == [*prompt_ids, *tokens]
