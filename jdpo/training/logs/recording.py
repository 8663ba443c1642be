"""Records the steps of a run: averages since the last log, in metrics.jsonl and in trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from jdpo.chips import peak_flops
from jdpo.processes import is_first
from jdpo.reports.trackers.backlog import line_of, line_of_samples
from jdpo.reports.writers import JsonlWriter
from jdpo.training.fit.flops import StepFlops
from jdpo.training.fit.memory_fit import peak_memory
from jdpo.training.logs.metrics import DatasetShares, Throughput, Window
from jdpo.training.logs.tracking import Tracking
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.run_setup import Setup


class Record:
    """The measurements since the last log, and the files that they are written to, which the first process opens."""

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        resources: ExitStack,
        trackers: Tracking,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
          directory: its metrics end at the step that the run continues from, see `cut_metrics`.
          resources: closes the file.
          trackers: get every line, too.
          position: the position of the checkpoint that the run continues from; None for a new run.
        """
        self._steps_per_epoch = setup.steps_per_epoch
        self._window = Window(position["window"] if position else None)
        self._num_tokens: int = position["num_tokens"] if position else 0
        self._throughput = Throughput(
            unit=setup.task.unit,
            num_devices=setup.mesh.size,
            peak=peak_flops(setup.mesh.devices.flat[0].device_kind, setup.config.compute_dtype),
        )
        # None of them is logged for a run of one dataset.
        self._shares = DatasetShares(setup.train_data)
        self._trackers = trackers
        self._jsonl = JsonlWriter(directory.metrics) if is_first() else None
        if self._jsonl is not None:
            resources.callback(self._jsonl.close)

    def position(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps; when it returns, everything that was logged before is on the disk."""
        if self._jsonl is not None:
            self._jsonl.sync()
        return {"num_tokens": self._num_tokens, "window": self._window.to_json()}

    def add(
        self,
        values: Mapping[str, float],
        rows: Mapping[str, np.ndarray],
        indices: np.ndarray,
        *,
        num_tokens: int,
        flops: StepFlops,
        seconds: float,
    ) -> dict[str, float]:
        """Adds a step.

        Args:
          values: of the whole step.
          rows: values [b] of its rows `indices` [b].

        Returns:
          the rates since the last log, see `Throughput.rates`.
        """
        self._num_tokens += num_tokens
        self._window.add(values, self._shares.of(rows, indices))
        self._throughput.add(num_rows=len(indices), num_tokens=num_tokens, flops=flops, seconds=seconds)
        return self._throughput.rates()

    def log(self, step: int, learning_rate: Any) -> dict[str, float]:
        """Writes the averages since the last log, and starts again.

        Args:
          learning_rate: of the last step, a float32.

        Returns:
          the values of the line.
        """
        values = {
            **self._window.averages(),
            # str gives the shortest decimal that is this float32: 0.001, not 0.0010000000474974513.
            "learning_rate": float(str(learning_rate)),
            "num_tokens": self._num_tokens,
            **self._throughput.rates(),
            "peak_memory_gib": peak_memory() / 2**30,
        }
        self.write(step, values)
        self._window = Window()
        self._throughput.clear()
        return values

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line about a step."""
        if self._jsonl is not None:
            line = {"step": step, "epoch": step / self._steps_per_epoch, **values}
            self._jsonl.write(line)
            self._trackers.put(line_of(line))

    def write_samples(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Gives the lines of samples.jsonl that belong to a step to the trackers."""
        self._trackers.put(line_of_samples(step, answers))
