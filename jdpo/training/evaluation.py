"""Losses and metrics of the held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdpo.data.batching.loader import prefetch
from jdpo.data.reference_cache.scores import ReferenceCache
from jdpo.losses.pair_losses import Totals
from jdpo.losses.router import load_balancing_loss
from jdpo.processes import PROGRESS
from jdpo.reports.progress import RunDisplay, figures_of
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.fit.assembly import Assembly
from jdpo.training.fit.compilation import Programs
from jdpo.training.logs.metrics import DatasetShares, RowAverages, rows_at
from jdpo.training.logs.phases import PhaseClock
from jdpo.training.logs.recording import Record
from jdpo.training.sanity_checks import check_evaluation
from jdpo.training.setup.batches import StepBatch, StepRows, make_batches, shapes_in_order
from jdpo.training.setup.run_setup import Log, Setup
from jdpo.training.step.train_step import EvaluationReport, Frozen, TrainState
from jdpo.types import RouterStats


class Evaluation:
    """The held-out rows of a run, in batches, and the programs that evaluate them."""

    def __init__(
        self,
        setup: Setup,
        assembly: Assembly,
        cache: ReferenceCache | None,
        pool: ThreadPoolExecutor,
        clock: PhaseClock,
        *,
        max_tokens_per_device: int,
    ) -> None:
        """
        Args:
          setup: with evaluation rows.
          cache: the reference's log-probs of these rows, where they are cached.
          pool: threads that compile.
          clock: of the run.
        """
        assert setup.eval_data is not None
        # Batches have the size of a training step, so that they fit the memory that was chosen for one.
        self._data, self._size, self._assembly = setup.eval_data, setup.config.global_batch_size, assembly
        self._unit = setup.task.unit
        self._shares = DatasetShares(setup.eval_data)
        self._batch_sharding = micro_batch_sharding(setup.mesh)
        self._batches = make_batches(
            setup, self._data, self._rows(), max_tokens_per_device=max_tokens_per_device, cache=cache
        )
        # What losses read of all rows, so that a mean does not depend on how they are cut into batches.
        num_tokens = self._data.num_chosen_tokens() if assembly.has_totals else 0
        # float32, the dtype that the evaluation is compiled for.
        counts: Any = np.float32(len(self._data)), np.float32(num_tokens)
        self._totals = place(Totals(*counts), replicated(setup.mesh)) if assembly.has_totals else None
        self.programs, self._clock = Programs(assembly.lower_evaluate, pool), clock
        clock.watch(self.programs)

    def prepare(self) -> None:
        """Starts compiling in the background."""
        self.programs.prepare(shapes_in_order(self._batches, self._rows()))

    def log(
        self,
        step: int,
        state: TrainState,
        frozen: Frozen,
        record: Record,
        display: RunDisplay,
        log: Log,
        breaks_off: Callable[[], bool],
    ) -> dict[str, float]:
        """Evaluates the state after a step, and logs and returns its metrics, {"eval_<name>": value}.

        Args:
          breaks_off: returns True to end the evaluation after a batch; then nothing is logged, and no metrics returned.

        Raises:
          FloatingPointError: a metric is not finite.
        """
        with display.compiling(), self._clock.within("compile"):  # which does not count as time of the evaluation
            self.programs.wait()
        started = time.perf_counter()
        with self._clock.within("evaluation"):
            averages = self.averages(state, frozen, breaks_off)
        if not averages:
            return {}
        seconds = time.perf_counter() - started
        metrics = {f"eval_{name}": value for name, value in averages.items()}
        check_evaluation(step, metrics)
        record.write(step, metrics | {f"eval_{self._unit}_per_second": len(self._data) / seconds})
        log(f"held-out after step {step}: {figures_of(averages)}")
        return metrics

    def averages(
        self, state: TrainState, frozen: Frozen, breaks_off: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Returns means over all rows, {name: value}; none if it was broken off."""
        # A reference that moves is part of the state, where steps keep it.
        frozen = self._assembly.evaluated(frozen, state)
        averages, routers = RowAverages(), list[RouterStats]()
        steps = list(self._rows())
        waiting: tuple[StepRows, Any] | None = None
        ahead = prefetch(lambda index: self._place(steps[index]), range(len(steps)))
        for batch, rows in ahead:
            program = self.programs.of(batch)
            report = program(state.params, frozen, batch, state.loss_state, self._totals)
            if waiting is not None:  # the device works on a batch while the host adds up the one before
                self._add(averages, routers, *waiting)
            waiting = rows, report
            if breaks_off():
                return {}
        assert waiting is not None
        self._add(averages, routers, *waiting)
        if not routers:
            return averages.averages()
        # The router's loss is a product of means over all rows, so that it cannot be averaged over batches.
        of_all = jax.tree.map(lambda *parts: np.concatenate(parts, dtype=np.float64), *routers)
        return {**averages.averages(), "aux_loss": float(load_balancing_loss(of_all))}

    def _add(self, averages: RowAverages, routers: list[RouterStats], of_batch: StepRows, on_device: Any) -> None:
        report: EvaluationReport = jax.tree.map(np.asarray, fetch(on_device))
        PROGRESS.made("evaluation")
        rows = rows_at(report.rows, of_batch.at)
        averages.add(rows, float(report.normalizer), self._shares.of(rows, of_batch.indices))
        routers += [] if report.router is None else [report.router]

    def _rows(self) -> Iterator[np.ndarray]:
        """The rows of each batch."""
        for start in range(0, len(self._data), self._size):
            yield np.arange(start, min(start + self._size, len(self._data)))

    def _place(self, indices: np.ndarray) -> StepBatch:
        batch, rows = self._batches.make(indices)
        return StepBatch(place(batch, self._batch_sharding), rows)
