"""Shows a conversation in a terminal, or as plain text elsewhere; text of a model is never read as markup."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jdpo.generation.chat.conversation import EndReason
from jdpo.safe_text import terminal, terminal_lines

NARROWEST = 36
"""Columns that an answer needs; where there are fewer, answers of two models are shown one after the other."""

_WIDEST_BAR = 24
_BESIDE_A_BAR = 30
"""Columns that token, log-probability and probability take."""

_ENDS: Mapping[EndReason, str] = {"stop": "", "length": "cut off, see /max", "interrupted": "interrupted"}


class TokenLine(NamedTuple):
    """A token in a table.

    Attributes:
      text: its text.
      logp: its log-probability.
    """

    text: str
    logp: float

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(self.logp)


class ChatView:
    """Writes to a console."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        """
        Args:
          names: of the models, in the order of all lists below.
        """
        self._console = console
        # Numbered, for commands that choose one of them.
        numbers = [f"{number} " if len(names) > 1 else "" for number in range(1, len(names) + 1)]
        self._names = [Text(number + terminal(name), "bold cyan") for number, name in zip(numbers, names, strict=True)]

    def show_note(self, text: str, style: Literal["", "dim", "red"] = "dim") -> None:
        """Prints a line of the program itself, as opposed to an answer."""
        self._console.print(Text(terminal_lines(text), style), soft_wrap=True)

    def answers(self, streams: Sequence[Generator[str, None, None]]) -> tuple[list[str], bool]:
        """Shows the answers of the models as they come.

        Args:
          streams: pieces of text of each model's answer.

        Returns:
          the answers, and whether Ctrl-C stopped them.
        """
        texts = [""] * len(streams)
        stopped = False
        try:
            self._show(streams, texts)
        except KeyboardInterrupt:
            stopped = True
        finally:
            for stream in streams:
                stream.close()
        return texts, stopped

    def _show(self, streams: Sequence[Generator[str, None, None]], texts: list[str]) -> None:
        if self._is_wide(len(streams)) and len(streams) > 1:
            self._show_beside(streams, texts)
            return
        for index, stream in enumerate(streams):
            if len(streams) > 1:
                self._console.print(self._names[index])
            try:
                for piece in stream:
                    texts[index] += piece
                    # Each piece alone, so that what is on the screen stays; the terminal breaks the lines.
                    self._console.print(Text(terminal_lines(piece)), end="", soft_wrap=True)
            finally:
                self._console.print()

    def _show_beside(self, streams: Sequence[Generator[str, None, None]], texts: list[str]) -> None:
        def table() -> Table:
            return self._beside([Text(terminal_lines(text)) for text in texts])

        # Shown while it grows as far as it fits, and once more as a whole, since a live table cannot scroll.
        if self._console.is_terminal:
            live: contextlib.AbstractContextManager[Live | None] = Live(
                console=self._console, transient=True, vertical_overflow="ellipsis"
            )
        else:
            live = contextlib.nullcontext()
        try:
            with live as shown:
                for index, piece in _in_turn(streams):
                    texts[index] += piece
                    if shown is not None:
                        shown.update(table())
        finally:
            self._console.print(table())

    def ends(self, ends: Sequence[EndReason]) -> None:
        """Says which answers are not whole."""
        for name, end in zip(self._names, ends, strict=True):
            if _ENDS[end]:
                self.show_note(f"({f'{name}: ' if len(ends) > 1 else ''}{_ENDS[end]})")

    def next_tokens(self, tables: Sequence[Sequence[TokenLine]]) -> None:
        """Shows each model's most probable next tokens with bars."""
        width = self._bar_width(len(tables))
        self._print_each([_tokens_table(lines, lines[0].probability, width) for lines in tables])

    def logps(self, tables: Sequence[Sequence[TokenLine]]) -> None:
        """Shows each model's log-probability of an answer, token by token, with sum and mean."""
        width = self._bar_width(len(tables))
        self._print_each([Group(_tokens_table(lines, 1.0, width, with_logp=True), _sums(lines)) for lines in tables])

    def commands(self, lines: Sequence[tuple[str, str]]) -> None:
        """Shows a list of commands."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for usage, summary in lines:
            grid.add_row(Text(usage, "bold"), Text(summary))
        self._console.print(grid)

    def _print_each(self, parts: Sequence[RenderableType]) -> None:
        if len(parts) > 1 and self._is_wide(len(parts)):
            self._console.print(self._beside(parts))
            return
        for name, part in zip(self._names, parts, strict=True):
            if len(parts) > 1:
                self._console.print(name)
            self._console.print(part)

    def _bar_width(self, num_columns: int) -> int:
        width = self._console.width // num_columns if self._is_wide(num_columns) else self._console.width
        return min(max(width - _BESIDE_A_BAR, 4), _WIDEST_BAR)

    def _is_wide(self, num_columns: int) -> bool:
        return self._console.width >= num_columns * (NARROWEST + 2)

    def _beside(self, parts: Sequence[RenderableType]) -> Table:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        for name in self._names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*parts)
        return table


def _tokens_table(lines: Sequence[TokenLine], widest: float, width: int, *, with_logp: bool = False) -> Table:
    """Returns a table of tokens with bars of up to `width` columns, which the probability `widest` has."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=with_logp)
    table.add_column("token", overflow="fold")
    if with_logp:
        table.add_column("logp", justify="right", no_wrap=True)
    table.add_column("prob." if with_logp else "", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for line in lines:
        # In quotes, since many tokens start with a space.
        cells: list[RenderableType] = [Text(f'"{terminal(line.text)}"')]
        if with_logp:
            cells.append(Text(f"{line.logp:.3f}"))
        bar = Bar(max(widest, 1e-9), 0, line.probability, width=width, color="cyan")
        table.add_row(*cells, Text(_percent(line.probability)), bar)
    return table


def _percent(probability: float) -> str:
    """Formats a probability; small ones have one digit.

    >>> _percent(0.973), _percent(0.0012), _percent(3e-5), _percent(2e-7)
    ('97.30 %', '0.12 %', '0.003 %', '2e-05 %')
    """
    percent = 100 * probability
    return f"{percent:.2f} %" if percent >= 0.005 or percent == 0 else f"{percent:.1g} %"


def _sums(lines: Sequence[TokenLine]) -> Text:
    total = sum(line.logp for line in lines)
    return Text(f"sum {total:.3f}, mean {total / len(lines):.3f} per token, {len(lines)} tokens", "dim")


def _in_turn(streams: Sequence[Generator[str, None, None]]) -> Iterator[tuple[int, str]]:
    """Yields the next piece of each stream in turn, with the stream's index, until all have ended."""
    open_streams = dict(enumerate(streams))
    while open_streams:
        for index, stream in list(open_streams.items()):
            piece = next(stream, None)
            if piece is None:
                del open_streams[index]
            else:
                yield index, piece
