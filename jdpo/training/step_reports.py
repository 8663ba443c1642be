"""The reports of the steps: read while the devices compute the next step, checked, and logged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jdpo.processes import PROGRESS
from jdpo.reports.progress import RunDisplay
from jdpo.sharding.placement import fetch
from jdpo.training.fit.flops import StepFlops
from jdpo.training.logs.metrics import mean_over_rows, rows_at
from jdpo.training.logs.recording import Record
from jdpo.training.sanity_checks import GradientWatch, check_finite, check_start
from jdpo.training.setup.batches import StepRows
from jdpo.training.setup.run_setup import Log, Setup
from jdpo.training.step.train_step import StepReport
from jdpo.types import completions_of


class _Launched(NamedTuple):
    """A step that runs on the devices."""

    step: int
    rows: StepRows
    flops: StepFlops
    report: StepReport


class StepReports:
    """Reads the report of each step one step late, so that the devices never wait for the host."""

    def __init__(
        self,
        setup: Setup,
        record: Record,
        display: RunDisplay,
        last_saved: Callable[[], int | None],
        log: Log,
    ) -> None:
        """
        Args:
          last_saved: returns the step of the newest checkpoint, or None, for error messages.
          log: takes lines for the user.
        """
        self._setup, self._record, self._display = setup, record, display
        self._last_saved, self._log = last_saved, log
        self._gradients = GradientWatch(
            setup.task.loss, learning_rate=setup.config.learning_rate, compute_dtype=setup.config.compute_dtype
        )
        self._watch = Stopwatch()
        self._launched: _Launched | None = None

    def untimed(self) -> contextlib.AbstractContextManager[None]:
        """While entered, time does not count as a step's."""
        return self._watch.paused()

    def launched(self, step: int, rows: StepRows, flops: StepFlops, report: StepReport) -> None:
        """Takes the report of a step that was just launched; the one before must have been read."""
        assert self._launched is None, self._launched.step
        self._launched = _Launched(step, rows, flops, report)
        PROGRESS.launched(step)

    def read(self) -> Mapping[str, float] | None:
        """Waits for the step that runs, if any; checks its numbers, adds them up, and logs them where that is due.

        Returns:
          the values that it logged, if any.

        Raises:
          FloatingPointError: loss, gradients or weights are not finite; step and rows are named.
          ValueError: policy and reference are meant to be equal at the start, and are not.
        """
        if self._launched is not None:
            launched, self._launched = self._launched, None
            return self._read(launched)
        return None

    def _read(self, launched: _Launched) -> Mapping[str, float] | None:
        step, of_step, flops, on_device = launched
        setup = self._setup
        # Waits for the devices: the time until here is that of the step.
        report: StepReport = fetch(on_device)
        seconds = self._watch.lap()
        PROGRESS.took(seconds)
        rows = rows_at(report.rows, of_step.at)
        loss, grad_norm = float(report.loss), float(report.grad_norm)
        if not report.finite:
            origins = [setup.train_data[int(index)].origin for index in of_step.indices]
            # If loss and gradients are finite, it is the update that overflowed.
            weights_finite = not np.isfinite([loss, grad_norm]).all()
            check_finite(
                step, loss, grad_norm, rows["loss"], origins, self._last_saved(), weights_finite=weights_finite
            )
        # Policy and reference are compared once, on the rewards of the first batch, which no update has changed yet.
        if step == 1:
            with self.untimed():
                self._check_start(rows, of_step.indices)
        values = {**mean_over_rows(rows), "loss": loss}
        if report.aux_loss is not None:
            values["aux_loss"] = float(report.aux_loss)
        of_update = {"grad_norm": grad_norm, "padding": of_step.padding}
        if (most := setup.config.max_grad_norm) is not None:
            of_update["grad_clipped"] = float(grad_norm > most)  # averaged over steps: the share of clipped ones
        rates = self._record.add(
            {**values, **of_update},
            rows,
            of_step.indices,
            num_tokens=of_step.num_tokens,
            flops=flops,
            seconds=seconds,
        )
        self._display.step(step, values, rates)
        if not setup.logs_after(step):
            return None
        logged = self._record.log(step, report.learning_rate)
        if (note := self._gradients.see(step, logged, self._last_saved())) is not None:
            self._log(note)
        return logged

    def _check_start(self, rows: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        """Compares policy and reference on the first batch, where the loss has a reference."""
        setup = self._setup
        loss = setup.task.loss
        if loss is None or not loss.needs_reference:
            return
        pairs = [setup.train_data[int(index)] for index in indices]
        self._log(
            check_start(
                rows,
                loss,
                lengths=np.array([[mask.sum() for _, mask in completions_of(pair)] for pair in pairs]),
                compute_dtype=setup.config.compute_dtype,
                reference_is_start=setup.reference_is_start,
            )
        )


class Stopwatch:
    """Measures the seconds between laps, except for those spent in `paused` blocks."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap, or since this object was made."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began
