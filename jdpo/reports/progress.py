"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
LINE_SECONDS = 15.0


def make_console() -> Console:
    """Where messages and progress go: standard error, so that standard output stays free for results."""
    return Console(file=sys.stderr, soft_wrap=True)


def figures_of(metrics: Mapping[str, float]) -> str:
    """The few metrics that a person follows.

    >>> figures_of({"loss": 0.69314, "logps/chosen": -80.0, "rewards/accuracies": 0.5})
    'loss 0.6931  accuracy 0.5'
    """
    return "  ".join(f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics)


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


class RunDisplay:
    """Shows step, loss, margin, accuracy, rows a second and time left. Use as a context manager."""

    def __init__(self, *, first_step: int, num_steps: int, unit: str, console: Console, shown: bool = True) -> None:
        """
        Args:
          first_step: where a resumed run starts, 0 for a new one.
          num_steps: steps of the whole run.
          unit: what a row is called: "pairs" or "rows".
          console: where it goes; what others print there stands above the bar.
          shown: False on all processes but one.
        """
        self._console, self._shown = console, shown
        self._num_steps, self._unit, self._first_step = num_steps, unit, first_step
        self._started = time.monotonic()
        self._line_due = 0.0
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step, figures="")

    def __enter__(self) -> RunDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """After every update.

        Args:
          rates: `<unit>_per_second`, `tokens_per_second` and, where it is known, `mfu`.
        """
        figures = f"{figures_of(metrics)}  {self._speed(rates)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures, description="training")
        elif self._shown and (time.monotonic() >= self._line_due or step == self._num_steps):
            self._line_due = time.monotonic() + LINE_SECONDS
            line = f"step {step}/{self._num_steps}  {figures}  {self._time_left(step)} left"
            self._console.print(line, markup=False, highlight=False)

    def _speed(self, rates: Mapping[str, float]) -> str:
        parts = [
            f"{rates[f'{self._unit}_per_second']:.3g} {self._unit}/s",
            f"{rates['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.0%}")
        return "  ".join(parts)

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        return _clock((time.monotonic() - self._started) / max(done, 1) * (self._num_steps - step))
