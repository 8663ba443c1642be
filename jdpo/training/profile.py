"""A trace of a few steps for TensorBoard's and XProf's profiler view."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """The first and last step of "10:13", both of them traced.

    Raises:
      ValueError: it is none.

    >>> parse_steps("10:13")
    (10, 13)
    """
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile_steps: expected FIRST:LAST, steps counted from 1, such as 10:13; found {text!r}")
    return int(first), int(last)


class Profiler:
    """Traces the steps that are asked for."""

    def __init__(self, steps: str | None, folder: Path) -> None:
        """
        Args:
          steps: as of `parse_steps`.
          folder: where the trace goes, `tensorboard --logdir` reads it.
        """
        self._steps, self._folder, self._on = parse_steps(steps), folder, False

    def is_due(self, step: int) -> bool:
        """Whether the trace begins with this step; what was launched before should end first."""
        return self._steps is not None and not self._on and self._steps[0] <= step <= self._steps[1]

    def is_last(self, step: int) -> bool:
        """Whether the trace ends with this step; it should have ended on the devices by then."""
        return self._on and self._steps is not None and step == self._steps[1]

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the launch of a step."""
        if self.is_due(step):
            jax.profiler.start_trace(self._folder)
            self._on = True
        if not self._on:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self.is_last(step):
            self.close()

    def close(self) -> None:
        """Writes the trace, where one is under way."""
        if self._on:
            self._on, self._steps = False, None
            jax.profiler.stop_trace()
