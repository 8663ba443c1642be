"""A trace of a few steps, for the profiler views of TensorBoard and XProf."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax


class Profiler:
    """Traces some of the steps of a run."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """
        Args:
          steps: the first and the last step to trace, counted from 1; None traces nothing.
          folder: where the trace is written, for `tensorboard --logdir`.
        """
        self._steps, self._folder, self._on = steps, folder, False

    def is_due(self, step: int) -> bool:
        """Returns True if the trace starts with this step; steps that were launched before should end first."""
        return self._steps is not None and not self._on and self._steps[0] <= step <= self._steps[1]

    def is_over(self, first: int) -> bool:
        """Returns True if a run that continues after step `first` has made all of these steps before."""
        return self._steps is not None and self._steps[1] <= first

    def is_last(self, step: int) -> bool:
        """Returns True if the trace ends with this step."""
        return self._on and self._steps is not None and step == self._steps[1]

    def begin(self, step: int) -> None:
        """Starts the trace if it is due; call it before a step is launched."""
        if self.is_due(step):
            jax.profiler.start_trace(self._folder)
            self._on = True

    def around(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Returns a context for the launch of a step, by which the trace names it."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._on else contextlib.nullcontext()

    def end(self, step: int) -> None:
        """Writes the trace if this step is its last; call it when the step has ended on the devices."""
        if self.is_last(step):
            self.close()

    def close(self) -> None:
        """Writes the trace, if one was started."""
        if self._on:
            # Traced once, even if the steps come again.
            self._on, self._steps = False, None
            jax.profiler.stop_trace()
