"""A conversation with one or two models: what each line of the user does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.generation.chat.chat_view import ChatView
from jdpo.generation.chat.conversation import Conversation, EndReason, pair_of
from jdpo.generation.chat.row_file import append_rows
from jdpo.generation.chat.speaker import Speaker
from jdpo.generation.values import Sampling
from jdpo.types import Text
from jdpo.words import did_you_mean, figure

MOST_SHOWN = 10
"""The number of most probable tokens that /next shows."""


class Command(NamedTuple):
    """A command of the conversation.

    Attributes:
      argument: what follows it, for /help.
      summary: what it does, for /help.
      run: takes the session and the argument, which may be empty.
      for_two: True for a command that needs two models.
    """

    argument: str
    summary: str
    run: Callable[[ChatSession, str], None]
    for_two: bool = False


class ChatSession:
    """The state of a conversation: its exchanges with each model, how answers are drawn, and the pairs chosen."""

    def __init__(
        self, speakers: Sequence[Speaker], view: ChatView, sampling: Sampling, *, system: str | None = None
    ) -> None:
        """
        Args:
          speakers: one or two models.
          sampling: how answers are drawn, until a command changes it.
          system: the system message.

        Raises:
          ValueError: a system message for a model without a chat template.
        """
        self.speakers, self.view, self.sampling = list(speakers), view, sampling
        self.conversations = [Conversation(is_chat=speaker.is_chat) for speaker in speakers]
        self.chosen: list[dict[str, Any]] = []
        """Pairs that /save has not written yet."""
        self._sample = 0  # the number of the next answer to the same prompt
        self.ended = False
        if system is not None:
            self.set_system(system)

    def greet(self) -> None:
        """Says what the models do with a line."""
        for speaker in self.speakers:
            if not speaker.is_chat:
                self.view.show_note(f"{speaker.model.name} has no chat template: it continues each text that you type")
        self.view.show_note("/help lists the commands, Ctrl-D ends")

    def take(self, line: str) -> None:
        """Does what a line asks for: runs a command, or answers a message. What cannot be done is shown, not raised."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._run(line)
            elif line.strip():
                # Two slashes begin a message that begins with one.
                self.ask(line.removeprefix("/"))
        except ValueError as error:
            self.view.show_note(str(error), "red")

    def _run(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS)
            raise ValueError(
                f"there is no command /{name}; {hint or '/help lists them'} (write // to begin a message with a slash)"
            )
        if COMMANDS[name].for_two and len(self.speakers) < 2:
            raise ValueError(f"/{name} needs two models: jdpo chat MODEL MODEL2")
        COMMANDS[name].run(self, argument.strip())

    def ask(self, message: str) -> None:
        """Answers a message with every model, and adds the exchange to the conversations."""
        self._sample = 0
        self._answer(self.conversations, message)

    def retry(self) -> None:
        """Draws another answer to the last message, in place of the last one."""
        message = self.conversations[0].last.message
        if self.sampling.temperature == 0:
            self.view.show_note("at temperature 0 the answer stays the same; /temperature 1 draws others")
        self._sample += 1
        self._answer([conversation.undone() for conversation in self.conversations], message)

    def _answer(self, conversations: Sequence[Conversation], message: str) -> None:
        # Before anything is shown, so that a prompt that is too long leaves the conversations as they are.
        streams = [
            speaker.stream(conversation.prompt_of(message), self.sampling, self._sample)
            for speaker, conversation in zip(self.speakers, conversations, strict=True)
        ]
        texts, stopped = self.view.answers([stream.pieces() for stream in streams])
        ends: list[EndReason] = [stream.end or "interrupted" for stream in streams]
        if stopped and not any(texts):
            self.view.show_note("stopped before the first token; the message is dropped")
            return
        self.view.ends(ends)
        self.conversations = [
            conversation.answered(message, stream.text, end, stream.message() if conversation.is_chat else None)
            for conversation, stream, end in zip(conversations, streams, ends, strict=True)
        ]

    def show_next(self, text: str) -> None:
        """Shows the most probable next tokens: of an answer that begins with `text`, or of an unfinished answer."""
        asked = [_next_of(conversation, text) for conversation in self.conversations]
        tables = [
            speaker.next_tokens(prompt, start, MOST_SHOWN)
            for speaker, (prompt, start, _) in zip(self.speakers, asked, strict=True)
        ]
        self.view.show_note(asked[0][2])
        self.view.next_tokens(tables)

    def show_logps(self, answer: str) -> None:
        """Shows the log-probability of an answer to the last message, per token."""
        tables = [
            speaker.logps(conversation.last_prompt, answer or conversation.last_answer)
            for speaker, conversation in zip(self.speakers, self.conversations, strict=True)
        ]
        self.view.logps(tables)

    def set_system(self, text: str) -> None:
        """Sets the system message, or shows it if the text is empty; "none" removes it."""
        if not text:
            system = self.conversations[0].system
            self.view.show_note("no system message" if system is None else f"system: {system}")
            return
        if not all(conversation.is_chat for conversation in self.conversations):
            raise ValueError(
                "a system message needs a chat template, which the model lacks; it continues plain text. "
                "--chat_template chatml, or a Jinja file, gives it one"
            )
        self.conversations = [
            dataclasses.replace(conversation, system=None if text == "none" else text)
            for conversation in self.conversations
        ]

    def set_sampling(self, field: str, kind: type[int] | type[float], text: str) -> None:
        """Sets a value of the sampling, or shows it if the text is empty."""
        if text:
            try:
                changed: dict[str, Any] = {field: kind(text)}
            except ValueError:
                raise ValueError(f"{field}: expected a {'whole ' * (kind is int)}number, found {text!r}") from None
            self.sampling = dataclasses.replace(self.sampling, **changed)
        self.view.show_note(f"{field} {getattr(self.sampling, field)}")

    def undo(self) -> None:
        """Removes the last exchange."""
        removed = self.conversations[0].last.message
        self.conversations = [conversation.undone() for conversation in self.conversations]
        self.view.show_note(f"removed {_short(removed)} and its answer")

    def reset(self) -> None:
        """Begins a new conversation with the same system message and sampling."""
        self.conversations = [dataclasses.replace(conversation, exchanges=()) for conversation in self.conversations]
        self.view.show_note("a new conversation")

    def choose(self, which: str) -> None:
        """Keeps the last answers as a pair; both models continue with the better answer."""
        if which not in ("1", "2"):
            raise ValueError(f"expected /choose 1 or /choose 2, found {which or 'nothing'}")
        better, worse = (self.conversations[index] for index in ((0, 1) if which == "1" else (1, 0)))
        if better.last.end != "stop":
            raise ValueError(
                "the chosen answer is not whole, and a model would learn to stop there; /retry, or raise /max"
            )
        self.chosen.append(pair_of(better, worse))
        # As in the collection of preference data: the next pair again has one prompt for both answers.
        self.conversations = [better, better]
        self.view.show_note(
            f"{figure(len(self.chosen), 'pair')} to save with /save FILE; both continue with answer {which}"
        )

    def save(self, argument: str) -> None:
        """Appends to a JSONL file: the pairs chosen, or with one model the conversation."""
        if not argument:
            raise ValueError("expected a file, such as /save rows.jsonl")
        path = Path(argument).expanduser()
        if len(self.speakers) == 1:
            conversation = self.conversations[0]
            total = append_rows(path, [conversation.row()])
            self.view.show_note(f"saved the conversation to {path} ({figure(total, 'row')})")
            if conversation.last.end != "stop":
                self.view.show_note("its last answer is not whole: a model that trains on it learns to stop there")
            return
        if not self.chosen:
            raise ValueError("there are no pairs to save; /choose 1 or /choose 2 after two answers makes one")
        total = append_rows(path, self.chosen)
        self.view.show_note(f"saved {figure(len(self.chosen), 'pair')} to {path} ({figure(total, 'row')})")
        self.chosen = []

    def show_help(self) -> None:
        """Lists the commands."""
        self.view.commands(
            [
                (f"/{name} {command.argument}".rstrip(), command.summary)
                for name, command in COMMANDS.items()
                if len(self.speakers) > 1 or not command.for_two
            ]
        )

    def end(self) -> None:
        """Ends the conversation."""
        self.ended = True


def _next_of(conversation: Conversation, text: str) -> tuple[Text, str, str]:
    """Returns the prompt and the start of its answer after which /next looks, and both in words."""
    if text and not (conversation.is_chat and conversation.exchanges):
        # Nothing was asked, so the text is continued as it is.
        return text, "", f"after the text {text!r}:"
    if not text and not conversation.exchanges:
        raise ValueError("there is no message yet; type one first, or write /next TEXT")
    last, prompt = conversation.last, conversation.last_prompt
    if text:
        return prompt, text, f"in an answer to {_short(last.message)} that begins with {text!r}:"
    if last.end == "stop":
        return prompt, "", f"first token of an answer to {_short(last.message)}:"
    return prompt, last.answer, f"next token of the answer to {_short(last.message)}:"


def _short(message: str) -> str:
    return repr(message if len(message) <= 40 else f"{message[:39]}…")


def _setting(field: str, kind: type[int] | type[float]) -> Callable[[ChatSession, str], None]:
    return lambda session, text: session.set_sampling(field, kind, text)


COMMANDS = {
    "next": Command("[TEXT]", "most probable next tokens, first in the answer or after TEXT", ChatSession.show_next),
    "logp": Command("[TEXT]", "log-prob of each token of TEXT as answer, or of the answer", ChatSession.show_logps),
    "retry": Command("", "another answer to the last message", lambda session, _: session.retry()),
    "undo": Command("", "remove the last message and its answer", lambda session, _: session.undo()),
    "reset": Command("", "begin a new conversation", lambda session, _: session.reset()),
    "system": Command("[TEXT]", "the system message; `none` removes it", ChatSession.set_system),
    "seed": Command("[N]", "seed of the answers", _setting("seed", int)),
    "temperature": Command("[X]", "0 always takes the most probable token", _setting("temperature", float)),
    "top_p": Command("[X]", "share of the most probable tokens to draw from", _setting("top_p", float)),
    "max": Command("[N]", "largest number of tokens of an answer", _setting("max_new_tokens", int)),
    "choose": Command("1|2", "keep the answers as a pair, this one as the better", ChatSession.choose, for_two=True),
    "save": Command("FILE", "append the conversation, or the pairs chosen, to a JSONL file", ChatSession.save),
    "help": Command("", "list the commands", lambda session, _: session.show_help()),
    "quit": Command("", "end, as Ctrl-D does", lambda session, _: session.end()),
}
"""The commands by name, in the order of /help."""
