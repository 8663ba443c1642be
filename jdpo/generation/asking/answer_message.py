r"""A generated answer as a message: its words and, apart from them, the thought before them.

Where a chat template writes a thought under a key of its own is found by rendering one:

    P  .. <|im_start|>assistant \n <think> \n
    T  .. <|im_start|>assistant \n <think> \n THOUGHT \n </think> \n \n ANSWER <|im_end|>
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jdpo.data.schemas.messages import assistant
from jdpo.data.templates.chat_template import RenderingTooSlow
from jdpo.data.templates.template_probe import ANSWER, TURNS
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.generation.asking.answer_text import content_of, gives, text_after
from jdpo.generation.asking.channels import has_channels, read_channels
from jdpo.types import Message

_THOUGHT = "jdpothought"


class Frame(NamedTuple):
    """Text that a chat template writes around the words of an answer.

    Attributes:
      lead: between the generation prompt and the thought; None: the template writes no thought there.
      middle: between the thought and the words.
      before: between the generation prompt and the words of an answer without a thought.
      after: between the words and the token that ends the turn.
    """

    lead: str | None
    middle: str
    before: str
    after: str


def message_of(
    row: RowTexts, prompt_ids: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer, *, ended: bool
) -> Message:
    """Returns a generated answer as a message, which training renders as the same tokens where that is possible.

    Args:
      row: the prompt.
      prompt_ids: its tokens.
      tokens: those of the answer, without the token that ends it.
      tokenizer: of the model.
      ended: whether the model has ended the answer, which is otherwise cut off.
    """
    read = read_message(text_after(prompt_ids, tokens, tokenizer), row, tokenizer, ended=ended)
    if read is None:
        return assistant(content_of(row, prompt_ids, tokens, tokenizer))
    return next((form for form in _forms(read) if gives(form, row, prompt_ids, tokens, tokenizer)), stripped(read))


def read_message(text: str, row: RowTexts, tokenizer: Tokenizer, *, ended: bool) -> Message | None:
    """Separates the parts of an answer.

    Args:
      text: the answer after the generation prompt, special tokens included.
      row, tokenizer, ended: see `message_of`.

    Returns:
      the message; None if all of the text is the answer's words.
    """
    if row.is_text:
        return None
    if has_channels(tokenizer) and (message := read_channels(text)) is not None:
        return message
    frame = _frame(tokenizer, json.dumps(row.template_kwargs or {}, sort_keys=True))
    if frame is None:
        return None
    lead, closing = (frame.lead or "").rstrip(), frame.middle.strip()
    if frame.lead is not None and text.startswith(lead):
        thought, closed, words = text[len(lead) :].partition(closing)
        if closed:
            return _message(words.removesuffix(frame.after), thought)
        # The prompt or the answer has opened a thought, and max_new_tokens cut it off.
        if not ended:
            return _message("", thought)
    before = frame.before.strip()
    if before and text.startswith(before):
        return _message(text[len(before) :].removesuffix(frame.after), "")
    return None


def _message(words: str, thought: str) -> Message:
    return {**assistant(words), "reasoning_content": thought} if thought.strip() else assistant(words)


def stripped(message: Message) -> Message:
    """Returns a message without whitespace around its texts."""
    return {key: value.strip() if isinstance(value, str) else value for key, value in message.items()}


def _forms(message: Message) -> Iterator[Message]:
    """Yields a message with less and with more of the whitespace that the template may write itself."""
    thought, words = message.get("reasoning_content", ""), message["content"]
    thoughts = dict.fromkeys((thought.strip(), thought.strip("\n"), thought))
    contents = dict.fromkeys((words.strip(), words.lstrip(), words.lstrip("\n"), words.removeprefix("\n\n"), words))
    for one, other in itertools.product(thoughts, contents):
        yield {**message, "content": other, **({"reasoning_content": one} if one else {})}


@functools.lru_cache(maxsize=16)
def _frame(tokenizer: Tokenizer, kwargs: str) -> Frame | None:
    """Returns the frame of answers; None if the template does not tell it.

    Args:
      kwargs: `chat_template_kwargs` of the row as JSON.
    """
    thinking: Message = {**TURNS[1], "reasoning_content": _THOUGHT}
    variables: Mapping[str, Any] = json.loads(kwargs)
    try:
        prompt, plain, whole = (
            tokenizer.probe.render(turns, add_generation_prompt=asks, kwargs=variables)
            for turns, asks in ((TURNS[:1], True), (TURNS, False), ([TURNS[0], thinking], False))
        )
    except RenderingTooSlow as error:
        raise ValueError(str(error)) from None
    except Exception:  # a template that refuses so plain a conversation has a frame of its own for each row
        return None
    if not plain.startswith(prompt) or ANSWER not in plain:
        return None
    before, _, tail = plain[len(prompt) :].partition(ANSWER)
    ends = [tokenizer.hf.convert_ids_to_tokens(token) for token in tokenizer.end_token_ids]
    places = [tail.find(end) for end in ends if end in tail]
    after = tail[: min(places)] if places else ""
    lead, found, rest = whole[len(prompt) :].partition(_THOUGHT)
    middle, answered, _ = rest.partition(ANSWER)
    # Without words between the thought and the answer, nothing would tell them apart.
    if not (whole.startswith(prompt) and found and answered and middle.strip()):
        return Frame(None, "", before, after)
    return Frame(lead, middle, before, after)
