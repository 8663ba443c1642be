"""A conversation as a value: its exchanges, the prompt of the next answer, and its rows for training."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from jdpo.data.schemas.messages import assistant, user
from jdpo.types import Message, Text

EndReason = Literal["stop", "length", "interrupted"]
"""Why an answer ends: the model ended it, it was cut off at `max_new_tokens`, or the user stopped it."""


class Exchange(NamedTuple):
    """A message of the user, and the answer to it.

    Attributes:
      message: what the user wrote.
      answer: what the model answered, as it was drawn.
      end: why the answer ends.
      reply: the answer as a message, with its thought apart; None: the answer is the content.
    """

    message: str
    answer: str
    end: EndReason
    reply: Message | None = None

    @property
    def answer_message(self) -> Message:
        """The answer as a message of the conversation."""
        return assistant(self.answer) if self.reply is None else self.reply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """The exchanges with one model.

    Attributes:
      is_chat: False for a model without a chat template. It continues text, and each message is a text of its own.
      system: the system message, or None.
    """

    is_chat: bool
    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def prompt_of(self, message: str) -> Text:
        """Returns the prompt that asks for the answer to a further message."""
        if not self.is_chat:
            return message
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns: list[Message] = [turn for exchange in self.exchanges for turn in _turns(exchange)]
        return [*system, *turns, user(message)]

    @property
    def last(self) -> Exchange:
        """The last exchange.

        Raises:
          ValueError: there is none yet.
        """
        if not self.exchanges:
            raise ValueError("there is no message yet; type one first")
        return self.exchanges[-1]

    @property
    def last_prompt(self) -> Text:
        """The prompt that the last answer was drawn for."""
        return self.undone().prompt_of(self.last.message)

    @property
    def last_answer(self) -> Text:
        """The last answer: a message, or the text that continues a text."""
        return [self.last.answer_message] if self.is_chat else self.last.answer

    def answered(self, message: str, answer: str, end: EndReason, reply: Message | None = None) -> Conversation:
        """Returns the conversation with a further exchange; see `Exchange`."""
        return self._with((*self.exchanges, Exchange(message, answer, end, reply)))

    def undone(self) -> Conversation:
        """Returns the conversation without its last exchange."""
        assert self.last
        return self._with(self.exchanges[:-1])

    def row(self) -> dict[str, Any]:
        """Returns the conversation as a row that `jdpo sft` reads; for plain text the last text and its continuation.

        Raises:
          ValueError: there is no answer yet.
        """
        last = self.last
        if not self.is_chat:
            return {"prompt": last.message, "completion": last.answer}
        return {"messages": [*self.undone().prompt_of(last.message), _turns(last)[1]]}

    def _with(self, exchanges: tuple[Exchange, ...]) -> Conversation:
        return dataclasses.replace(self, exchanges=exchanges)


def pair_of(better: Conversation, worse: Conversation) -> dict[str, Any]:
    """Returns the last answers of two models as a row of pairs that `jdpo dpo` reads.

    Raises:
      ValueError: the answers are equal, or do not answer the same prompt.
    """
    prompt = better.last_prompt
    if better.is_chat != worse.is_chat or prompt != worse.last_prompt:
        raise ValueError(
            "the two models have different conversations before these answers, so they are no pair. Choose after each "
            "message, or begin again with /reset"
        )
    chosen, rejected = better.last.answer, worse.last.answer
    if chosen == rejected:
        raise ValueError("the two answers are the same; /retry draws others")
    if not better.is_chat:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "chosen": [_turns(better.last)[1]], "rejected": [_turns(worse.last)[1]]}


def _turns(exchange: Exchange) -> list[Message]:
    return [user(exchange.message), exchange.answer_message]
