"""The prompts that a run answers while it trains, read and tokenized before anything else is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from jdpo.config import DatasetConfig, SampleSettings
from jdpo.data.schemas.formats import Dropped
from jdpo.data.schemas.messages import as_messages
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.generation.prompts import make_question, read_prompts
from jdpo.generation.values import Question
from jdpo.training.setup.row_order import Log
from jdpo.words import figure

MOST_PROMPTS = 1000
"""More prompts than anybody reads, and each sampling would hold up training."""


class SamplePrompt(NamedTuple):
    """A prompt and its token ids."""

    question: Question
    tokens: list[int]


def read_sample_prompts(
    settings: SampleSettings, tokenizer: Tokenizer, log: Log, *, max_positions: int
) -> tuple[SamplePrompt, ...]:
    """Reads `sample_prompts`, and logs what was read; there are none if the key is not set.

    Args:
      log: takes lines for the user.
      max_positions: positions of the model, which a prompt and its answer must not exceed.

    Raises:
      ValueError: prompts cannot be read, are too many or too long, or are refused by the chat template; or a key is set
        that has no effect.
    """
    given = settings.sample_prompts
    if given is None:
        if settings.sample_steps is not None:
            raise ValueError(f"sample_steps {settings.sample_steps} needs sample_prompts: there is nothing to answer")
        return ()
    if isinstance(given, str):
        if " " in given and not os.path.exists(os.path.expanduser(given)):
            raise ValueError(
                f'sample_prompts: there is no file {given!r}; if it is a prompt, write it as a list: ["{given}"]'
            )
        prompts = read_prompts(DatasetConfig(path=given), num_prompts=MOST_PROMPTS + 1)
        for line in prompts.lines():
            log(f"sample_{line.lstrip()}")
        questions = prompts.questions
    else:
        questions = _listed(given, tokenizer)
    if len(questions) > MOST_PROMPTS:
        raise ValueError(
            f"sample_prompts: {given} has more than {MOST_PROMPTS:,} prompts, which would hold up training; "
            "`jdpo generate` answers many prompts"
        )
    found = [SamplePrompt(question, _tokens_of(question, tokenizer)) for question in questions]
    for prompt in found:
        if len(prompt.tokens) >= max_positions:
            raise ValueError(
                f"{prompt.question.origin}: the prompt has {figure(len(prompt.tokens), 'token')}, which leaves none of "
                f"the model's {max_positions} positions for an answer; leave the prompt out"
            )
    return tuple(found)


def _listed(messages: Sequence[str], tokenizer: Tokenizer) -> list[Question]:
    """Returns questions of the messages of a user; of plain texts if there is no chat template."""
    for text in messages:
        if os.path.isfile(text):  # unlike Path, it takes texts that are too long for a name
            raise ValueError(
                f"sample_prompts: {text!r} is in a list, which holds prompts, but it is a file; write it without the "
                "brackets"
            )
    is_chat = tokenizer.has_chat_template
    return [
        make_question(as_messages(text) if is_chat else text, f"sample_prompts[{index}]")
        for index, text in enumerate(messages)
    ]


def _tokens_of(question: Question, tokenizer: Tokenizer) -> list[int]:
    row = RowTexts(question.prompt, (), question.origin, question.tools, question.template_kwargs)
    tokens = encode_prompt(row, tokenizer)
    if isinstance(tokens, Dropped):
        raise ValueError(f"{question.origin}: the prompt cannot be answered: {tokens.reason} {tokens.detail}".rstrip())
    return tokens
