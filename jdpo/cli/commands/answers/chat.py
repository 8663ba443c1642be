"""`jdpo chat MODEL [MODEL2]`: a conversation in the terminal, with one model or with two side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from jdpo.cli.model_options import add_model, add_sampling, check_models, opening, sampling_of
from jdpo.cli.parsing import Parser, add_help

if TYPE_CHECKING:
    from jdpo.generation.chat.session import ChatSession

PROMPT = "> "


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "chat",
        "MODEL [MODEL2] [--system TEXT] [--temperature X] ...",
        "Answers messages that you type. With two models, both answer, side by side and with the same seed. Lines that "
        "start with a slash are commands: /help lists them. A backslash at the end of a line continues the message on "
        "the next one. Ctrl-C stops an answer, Ctrl-D ends. Messages may also come from a pipe, one per line. A model "
        "without a chat template continues the text that you type.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument(
        "model",
        metavar="MODEL",
        nargs="+",
        help="One or two of: a model folder, a hub name, a PEFT adapter, the output_dir of a run, or its "
        "checkpoints/STEP.",
    )
    options.add_argument("--system", metavar="TEXT", help="The system message; by default none.")
    add_sampling(options, max_new_tokens=512)
    add_model(parser.add_argument_group("Model"))
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "chat", command
    asked = parser().parse_args(words)
    if len(asked.model) > 2:
        raise ValueError(f"expected one or two models, found {len(asked.model)}: {', '.join(asked.model)}")
    # Before models are loaded, which takes long.
    sampling = sampling_of(asked)
    from rich.console import Console

    from jdpo.generation.chat.chat_view import ChatView
    from jdpo.generation.chat.session import ChatSession
    from jdpo.generation.chat.speaker import Speaker

    check_models(asked.model)
    console = Console(highlight=False)
    with opening(command, asked.dtype, asked.chat_template) as load:
        with console.status("loading"):
            speakers = [Speaker(load(path)) for path in asked.model]
        session = ChatSession(speakers, ChatView(console, asked.model), sampling, system=asked.system)
        session.greet()
        converse(session, typed if sys.stdin.isatty() else piped)
    return 0


def converse(session: ChatSession, read: Callable[[], str | None]) -> None:
    """Gives lines to the session until it ends, or `read` returns None."""
    while not session.ended:
        try:
            line = read()
        except KeyboardInterrupt:
            # As in a shell, Ctrl-C drops the line.
            session.view.show_note("\n/quit or Ctrl-D ends")
            continue
        if line is None:
            return
        session.take(line)


def typed() -> str | None:
    """Reads a message from the terminal, with line editing where Python has it; a backslash at the end continues it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines once it is imported
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(input(PROMPT if not lines else ". "))
        except EOFError:
            print()
            return None
    return _joined(lines)


def piped() -> str | None:
    """Reads a message from a pipe or a file, and shows it."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        line = sys.stdin.readline()
        if not line:
            break
        lines.append(line.rstrip("\r\n"))
    if not lines:
        return None
    from jdpo.safe_text import terminal_lines

    print(terminal_lines(f"{PROMPT}{_joined(lines)}"), flush=True)
    return _joined(lines)


def _joined(lines: Sequence[str]) -> str:
    text = "\n".join([line.removesuffix("\\") for line in lines[:-1]] + [lines[-1]])
    # Bytes that are no UTF-8 come in as halves of surrogate pairs, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode()
