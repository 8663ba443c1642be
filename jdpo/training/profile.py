"""A trace of a few steps for TensorBoard's and XProf's profiler view."""

from __future__ import annotations

import contextlib
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

    def is_over(self, first: int) -> bool:
        """Whether a run that goes on behind step `first` has made all of these steps before."""
        return self._steps is not None and self._steps[1] <= first

    def is_last(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._on and self._steps is not None and step == self._steps[1]

    def begin(self, step: int) -> None:
        """Before a step is launched: begins the trace where it is due."""
        if self.is_due(step):
            jax.profiler.start_trace(self._folder)
            self._on = True

    def around(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Around the launch of a step, which the trace then names."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._on else contextlib.nullcontext()

    def end(self, step: int) -> None:
        """Behind a step, when it has ended on the devices: writes the trace where it was the last."""
        if self.is_last(step):
            self.close()

    def close(self) -> None:
        """Writes the trace, where one is under way."""
        if self._on:
            self._on, self._steps = False, None
            jax.profiler.stop_trace()
