"""Shows the progress of a run: a live bar in a terminal, a live line in a notebook, plain lines elsewhere."""

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

from jdpo.reports.notebooks import NotebookLine, in_notebook
from jdpo.safe_text import terminal_lines
from jdpo.words import clock

SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
LINE_SECONDS, NOTEBOOK_SECONDS = 15.0, 0.5
"""Seconds between two lines in a log file, and between two texts of the line in a notebook."""

LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
"""Words at the start of a line, and their colours in a terminal."""

WIDE = 120
"""Terminals of at least this many columns get a long bar."""


def make_console() -> Console:
    """Returns the console for messages and progress: standard error, so that standard output is free for results.

    In a notebook it is standard output, since notebooks colour standard error as an error.
    """
    if in_notebook():
        # A kernel takes itself for a terminal, and rich would make each message a page of its own.
        return Console(file=sys.stdout, soft_wrap=True, force_jupyter=False, force_terminal=False, color_system=None)
    # rich would cut lines at 80 columns where there is no terminal, such as in a log file.
    return Console(file=sys.stderr, soft_wrap=True)


def print_lines(console: Console, text: str) -> None:
    """Prints a message to a console of `make_console`, safe for a terminal.

    In a terminal, lines are wrapped between words; a longer word, such as a path, stays whole so that it can be copied.
    Elsewhere, lines are not wrapped.
    """
    lines = terminal_lines(text).split("\n")
    if console.is_terminal:
        lines = [part for line in lines for part in _broken(line, console.width)]
    # As Text, so that brackets and colons in names are not read as rich's markup and emoji codes.
    shown = Text("\n".join(lines))
    for level, style in LEVEL_STYLES.items():
        shown.highlight_regex(rf"(?m)^{level}:", style)
    console.print(shown, soft_wrap=True)


def _broken(line: str, width: int) -> list[str]:
    """Splits a line into parts of at most `width` characters; continuation lines are indented."""
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
    """Formats the few metrics that people watch.

    >>> figures_of({"loss": 0.69314, "logps/chosen": -80.0, "rewards/accuracies": 0.5})
    'loss 0.6931  accuracy 0.5'
    """
    return "  ".join(_followed(metrics))


def _rate(value: float) -> str:
    """
    >>> _rate(0.51234), _rate(35.54), _rate(1063.2)
    ('0.512', '35.5', '1,063')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _followed(metrics: Mapping[str, float]) -> list[str]:
    return [f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics]


class RowCounter:
    """Logs at intervals how many rows were read while a large dataset is tokenized."""

    def __init__(self, log: Callable[[str], None], *, seconds: float = 10.0, doing: str = "tokenizing") -> None:
        """
        Args:
          log: receives the lines.
          seconds: time between two lines.
          doing: what is being done with the rows.
        """
        self._log, self._seconds, self._doing = log, seconds, doing
        self._started = self._logged = time.monotonic()

    def __call__(self, num_rows: int, total: int | None = None) -> None:
        """Logs a line if one is due; to be called now and then.

        Args:
          num_rows: rows read so far.
          total: number of all rows, if it is known.
        """
        now = time.monotonic()
        if now < self._logged + self._seconds:
            return
        self._logged = now
        rate = num_rows / (now - self._started)
        of, left = "", ""
        if total is not None:
            of, left = f" of {total:,}", f", {clock(max(total - num_rows, 0) / rate)} left"
        self._log(f"{self._doing}: {num_rows:,}{of} rows read, {rate:,.0f} per second{left}")


class _Figures(ProgressColumn):
    """A column with as many figures of the last step as fit in the terminal, the most important first."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """Returns the figures that fit to the right of the other columns, which are never cut."""
        num_steps = f"{task.total:.0f}"
        # The count at its widest, so that figures do not come and go as it grows.
        others = [task.description, "-" * _bar_width(self._console), f"{num_steps}/{num_steps}", task.fields["left"]]
        width = self._console.width - sum(len(part) + 1 for part in others)
        shown = ""
        for figure in task.fields["figures"]:
            longer = f"{shown}  {figure}" if shown else figure
            # Stop at the first that does not fit: a less important one must not take its place.
            if len(longer) > width:
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
          first_step: first step of a resumed run, 0 for a new one.
          num_steps: number of steps of the whole run.
          unit: name of the rows, "pairs" or "rows".
          console: receives the display; other output to it appears above the bar.
          shown: False on all processes except one.
        """
        self._console, self._shown = console, shown
        self._num_steps, self._unit, self._first_step = num_steps, unit, first_step
        self._started = time.monotonic()
        self._compiled_for = 0.0
        self._line_due = 0.0
        self._bar: Progress | None = None
        self._line = NotebookLine() if shown and in_notebook() else None
        self._waiting: str | None = None  # the text of the line that is not shown yet
        # In a log file, a bar would leave one line per refresh; `step` prints lines at intervals instead.
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
        if self._line is not None and self._waiting is not None:
            self._line.show(self._waiting)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Excludes the time while entered, in which a program is compiled, from the estimate of the time left."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._compiled_for += time.monotonic() - began

    def step(self, step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Shows a step that has just been taken.

        Args:
          rates: `<unit>_per_second`, `tokens_per_second` and, if known, `mfu`.
        """
        figures = [*_followed(metrics), *self._speed(rates)]
        left = f"{self._time_left(step)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures, left=left, description="training")
        elif self._shown:
            self._show(f"step {step}/{self._num_steps}  {'  '.join(figures)}  {left}", is_last=step == self._num_steps)

    def _show(self, text: str, *, is_last: bool) -> None:
        """Shows a line if one is due; the last step always has one, so that a log ends with the final figures."""
        if time.monotonic() < self._line_due and not is_last:
            self._waiting = text
            return
        self._waiting = None
        if self._line is not None:
            self._line_due = time.monotonic() + NOTEBOOK_SECONDS
            self._line.show(text)
        else:
            self._line_due = time.monotonic() + LINE_SECONDS
            self._console.print(text, markup=False, highlight=False, emoji=False)

    def _speed(self, rates: Mapping[str, float]) -> list[str]:
        parts = [
            f"{_rate(rates[f'{self._unit}_per_second'])} {self._unit}/s",
            f"{rates['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.0%}")
        return parts

    def _time_left(self, step: int) -> str:
        seconds = time.monotonic() - self._started - self._compiled_for
        # Steps of an earlier start took none of this time.
        return clock(seconds / max(step - self._first_step, 1) * (self._num_steps - step))
