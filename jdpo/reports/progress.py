"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from jdpo.safe_text import terminal_lines

SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
LINE_SECONDS = 15.0
WIDE = 120
"""Columns of a terminal from which on the bar is long."""


def make_console() -> Console:
    """Where messages and progress go: standard error, so that standard output stays free for results."""
    return Console(file=sys.stderr, soft_wrap=True)


def print_lines(console: Console, text: str) -> None:
    """Prints a message, made safe, where `make_console` puts it.

    A terminal gets lines that end between words; a word that is longer, such as a path, stays whole, so that it can be
    copied. Anywhere else, lines are as long as they are.
    """
    lines = terminal_lines(text).split("\n")
    if console.is_terminal:
        lines = [part for line in lines for part in _broken(line, console.width)]
    console.print("\n".join(lines), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _broken(line: str, width: int) -> list[str]:
    """A line in parts of at most `width` characters; further ones are set in."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def figures_of(metrics: Mapping[str, float]) -> str:
    """The few metrics that a person follows.

    >>> figures_of({"loss": 0.69314, "logps/chosen": -80.0, "rewards/accuracies": 0.5})
    'loss 0.6931  accuracy 0.5'
    """
    return "  ".join(_followed(metrics))


def _followed(metrics: Mapping[str, float]) -> list[str]:
    return [f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics]


class RowCounter:
    """Says every so often how many rows were read, while a large data set is tokenized."""

    def __init__(self, say: Callable[[str], None], *, seconds: float = 10.0, doing: str = "tokenizing") -> None:
        """
        Args:
          say: takes lines for the person who started the run.
          seconds: from one line to the next.
          doing: what is done with the rows.
        """
        self._say, self._seconds, self._doing = say, seconds, doing
        self._started = self._told = time.monotonic()

    def __call__(self, num_rows: int, total: int | None = None) -> None:
        """To be called now and then.

        Args:
          num_rows: rows read so far.
          total: rows there are, where that is known.
        """
        now = time.monotonic()
        if now < self._told + self._seconds:
            return
        self._told = now
        rate = num_rows / (now - self._started)
        of, left = "", ""
        if total is not None:
            of, left = f" of {total:,}", f", {_clock(max(total - num_rows, 0) / rate)} left"
        self._say(f"{self._doing}: {num_rows:,}{of} rows read, {rate:,.0f} a second{left}")


def _clock(seconds: float) -> str:
    """
    >>> _clock(3725.4)
    '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class _Figures(ProgressColumn):
    """The figures of the last step, those that the terminal has room for: the first ones are the most important."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """What fits to the right of everything else, which is never cut for it."""
        num_steps = f"{task.total:.0f}"
        beside = [task.description, "-" * _bar_width(self._console), f"{num_steps}/{num_steps}", task.fields["left"]]
        room = self._console.width - sum(len(part) + 1 for part in beside)
        shown = ""
        for figure in task.fields["figures"]:
            longer = f"{shown}  {figure}" if shown else figure
            if len(longer) > room:
                break
            shown = longer
        return Text(shown)


def _bar_width(console: Console) -> int:
    return 24 if console.width >= WIDE else 10


class RunDisplay:
    """Shows step, time left, loss, margin, accuracy and rows per second. Use as a context manager."""

    def __init__(self, *, first_step: int, num_steps: int, unit: str, console: Console, shown: bool = True) -> None:
        """
        Args:
          first_step: where a resumed run starts, 0 for a new one.
          num_steps: steps of the whole run.
          unit: what a row is called: "pairs" or "rows".
          console: where it goes; what others print there is above the bar.
          shown: False on all processes except one.
        """
        self._console, self._shown = console, shown
        self._num_steps, self._unit, self._first_step = num_steps, unit, first_step
        self._started = time.monotonic()
        self._compiled_for = 0.0
        self._line_due = 0.0
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=_bar_width(console)),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
                _Figures(console),
                console=console,
            )
            self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step, figures=[], left="")

    def __enter__(self) -> RunDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """While entered, a program is waited for: that happens a few times, so the time left does not count it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._compiled_for += time.monotonic() - began

    def step(self, step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Shows an update that has just been made.

        Args:
          rates: `<unit>_per_second`, `tokens_per_second` and, where it is known, `mfu`.
        """
        figures = [*_followed(metrics), *self._speed(rates)]
        left = f"{self._time_left(step)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures, left=left, description="training")
        elif self._shown and (time.monotonic() >= self._line_due or step == self._num_steps):
            self._line_due = time.monotonic() + LINE_SECONDS
            line = f"step {step}/{self._num_steps}  {'  '.join(figures)}  {left}"
            self._console.print(line, markup=False, highlight=False, emoji=False)

    def _speed(self, rates: Mapping[str, float]) -> list[str]:
        parts = [
            f"{rates[f'{self._unit}_per_second']:.3g} {self._unit}/s",
            f"{rates['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.0%}")
        return parts

    def _time_left(self, step: int) -> str:
        seconds = time.monotonic() - self._started - self._compiled_for
        return _clock(seconds / max(step - self._first_step, 1) * (self._num_steps - step))
