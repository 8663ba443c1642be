"""The tokens of a prompt to be answered, as a model sees it in training up to the answer."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens import call_arguments
from jdpo.data.tokens.boundaries import EMPTY_PROMPT, with_bos
from jdpo.data.tokens.row_rendering import RowTexts, conversation, encode_rendered, render_all
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message


def encode_prompt(row: RowTexts, tokenizer: Tokenizer) -> list[int] | Dropped:
    """Returns the token ids of a prompt.

    A conversation is written with the chat template and ends with the header of the answer to come; plain text starts
    with BOS if the tokenizer writes one.

    Args:
      row: a prompt without completions.
      tokenizer: needs a chat template if the prompt is a conversation.

    Raises:
      ValueError: the prompt is a conversation and the tokenizer has no chat template.
    """
    if row.is_text:
        (ids,) = tokenizer.encode([str(row.prompt)])
        return with_bos(ids, tokenizer) or Dropped(EMPTY_PROMPT, row.origin)
    if not row.prompt:
        return Dropped(EMPTY_PROMPT, row.origin)

    def render(parts: Sequence[list[Message]]) -> list[str] | Dropped:
        return render_all([*parts], [True], row, tokenizer)

    parts = call_arguments.settled(
        [conversation(row.prompt)], row.origin, render, objects_work=lambda: call_arguments.takes_objects(tokenizer)
    )
    texts = parts if isinstance(parts, Dropped) else render(parts)
    return texts if isinstance(texts, Dropped) else encode_rendered(texts, tokenizer)[0]
