"""What a run tells of its steps: averages since the last log, in metrics.jsonl and to trackers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from jdpo.config import to_public_dict
from jdpo.reports.writers import JsonlWriter, Writer, make_trackers
from jdpo.training.fit.flops import StepFlops, peak_flops
from jdpo.training.fit.memory_fit import peak_memory
from jdpo.training.logs.metrics import DatasetShares, Throughput, Window
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.run_setup import Setup


class Record:
    """What was measured since the last log, and where it is written. Only the first process opens files."""

    def __init__(self, setup: Setup, directory: RunDirectory) -> None:
        self._setup, self._directory = setup, directory
        self._window, self._num_tokens = Window(), 0
        self._throughput = Throughput(
            unit=setup.task.unit,
            num_devices=setup.mesh.size,
            peak=peak_flops(setup.mesh.devices.flat[0].device_kind, setup.config.compute_dtype),
        )
        self._shares = DatasetShares(setup.train_data)
        self._jsonl: JsonlWriter | None = None
        self._writers: list[Writer] = []

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on where `position` was taken."""
        self._window, self._num_tokens = Window(position["window"]), position["num_tokens"]

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps; what was logged before is on the disk when this returns."""
        if self._jsonl is not None:
            self._jsonl.sync()
        return {"num_tokens": self._num_tokens, "window": self._window.to_json()}

    def open(self, resources: ExitStack) -> None:
        """Opens the files; the metrics end at the step that the run continues from, see `cut_metrics`.

        Args:
          resources: closes them.
        """
        config = self._setup.config
        self._jsonl = JsonlWriter(self._directory.metrics)
        self._writers = [self._jsonl, *make_trackers(config.report_to, self._directory.path, to_public_dict(config))]
        for writer in self._writers:
            resources.callback(writer.close)

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
        """Takes a step; its rates come back, as of `Throughput.rates`.

        Args:
          values: of the whole step.
          rows: values [b] of its rows `indices` [b].
        """
        self._num_tokens += num_tokens
        self._window.add(values, self._shares.of(rows, indices))
        self._throughput.add(num_rows=len(indices), num_tokens=num_tokens, flops=flops, seconds=seconds)
        return self._throughput.rates()

    def log(self, done: int, learning_rate: Any) -> dict[str, float]:
        """Writes the averages since the last log, and begins anew.

        Args:
          learning_rate: of the last step, a float32.

        Returns:
          the averages.
        """
        averages = self._window.averages()
        self.write(
            done,
            {
                **averages,
                # str gives the shortest decimal that is this float32: 0.001, not 0.0010000000474974513.
                "learning_rate": float(str(learning_rate)),
                "num_tokens": self._num_tokens,
                **self._throughput.rates(),
                "peak_memory_gib": peak_memory() / 2**30,
            },
        )
        self._window = Window()
        self._throughput.clear()
        return averages

    def write(self, done: int, values: Mapping[str, Any]) -> None:
        """Writes a line about step `done`."""
        for writer in self._writers:
            writer.write({"step": done, "epoch": done / self._setup.steps_per_epoch, **values})
