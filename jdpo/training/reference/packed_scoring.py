"""The frozen reference's log-probs of rows, computed by the packed rows and the function that training uses.

Axes: k micro-batches, m rows of slots, c scored tokens of a row; see `jdpo.types.PackedBatch`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jdpo.data.batching.packing_plan import ItemSizes
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.reference_cache.scores import RowLogps
from jdpo.models.transformer import Transformer
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.setup.batches import PackedBatches
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.weight_placement import load_reference_weights
from jdpo.training.step.objectives import PackedLogps
from jdpo.types import AnyPair, PackedBatch, completions_of

Array = Any
Params = Any

TOKENS_PER_DEVICE = 8192
"""Slots of a device's part of a batch, where the config leaves it open: a forward pass keeps little, and more slots are
not faster."""


class ScoringPlan(NamedTuple):
    """Batches of the rows to score.

    Attributes:
      data: the dataset.
      steps: the rows of each batch, by the part of the dataset that they are in.
      batches: lays out the rows of a batch.
    """

    data: PreparedData
    steps: dict[range, list[np.ndarray]]
    batches: PackedBatches


class Scorer:
    """The frozen reference on the mesh, loaded when the first row is scored and freed with this object."""

    def __init__(self, setup: Setup, stopped: Callable[[], bool]) -> None:
        """
        Args:
          stopped: returns True if a signal asks to stop.
        """
        self._setup, self._stopped = setup, stopped
        self._num_shards = num_batch_shards(setup.mesh)
        self._max_tokens = setup.config.max_tokens_per_device or TOKENS_PER_DEVICE

    def check_stopped(self) -> None:
        """Raises BuildStopped if a signal asks to stop."""
        if self._stopped():
            raise BuildStopped

    def plan(self, data: PreparedData, parts: Sequence[range]) -> ScoringPlan:
        """Cuts the rows to score into batches of few shapes.

        Args:
          parts: the rows of each later call of `score`.
        """
        steps = {rows: self._cut(data.sizes(), rows) for rows in parts}
        batches = PackedBatches(
            self._setup.task,
            data,
            (indices for of_part in steps.values() for indices in of_part),
            num_shards=self._num_shards,
            max_tokens_per_device=self._max_tokens,
            micro_batch_size=self._setup.config.micro_batch_size,
        )
        return ScoringPlan(data, steps, batches)

    def _cut(self, sizes: ItemSizes, rows: range) -> list[np.ndarray]:
        """Batches of about a full micro-batch each, the longest rows first, so that too long ones fail at once."""
        order = np.argsort(-sizes.slots[rows.start : rows.stop], kind="stable") + rows.start
        most_rows = (self._setup.config.micro_batch_size or len(rows)) * self._num_shards
        most_slots = self._max_tokens * self._num_shards
        batches: list[list[int]] = []
        # Full from the start, so that the first row opens a batch.
        used = most_slots
        for index in order.tolist():
            slots = int(sizes.slots[index])
            if used + slots > most_slots or len(batches[-1]) == most_rows:
                batches.append([])
                used = 0
            batches[-1].append(index)
            used += slots
        return [np.array(batch) for batch in batches]

    def score(self, plan: ScoringPlan, rows: range, progress: Callable[[int], None]) -> list[RowLogps]:
        """Computes the log-probs of the completion tokens of each row of a part of a plan.

        Args:
          progress: called after each batch with its number of rows.

        Raises:
          FloatingPointError: a log-prob is not finite; its row is named.
          BuildStopped: a signal asks to stop.
        """
        scored: dict[int, RowLogps] = {}
        launched: deque[tuple[np.ndarray, PackedBatch, Array]] = deque()

        def read() -> None:
            indices, batch, on_device = launched.popleft()
            scored.update(_rows_of(plan.data, batch, fetch(on_device)))
            progress(len(indices))

        for indices in plan.steps[rows]:
            # Between batches, so that a signal ends a long computation soon.
            self.check_stopped()
            batch = plan.batches.make(indices).batch
            launched.append((indices, batch, self._launch(batch)))
            if len(launched) > 1:  # the device works on a batch while the host reads the one before
                read()
        while launched:
            read()
        return [scored[row] for row in rows]

    def _launch(self, batch: PackedBatch) -> Array:
        setup = self._setup
        # Without gradients there is nothing to recompute.
        logps = _compiled(setup.model.clone(remat="none"), setup.mesh)
        return logps(self._params, place(batch, micro_batch_sharding(setup.mesh)))

    @functools.cached_property
    def _params(self) -> Params:
        return load_reference_weights(self._setup)


def _rows_of(data: PreparedData, batch: PackedBatch, logps: np.ndarray) -> dict[int, RowLogps]:
    """The log-probs [k, m, c] of a batch as the values of each completion, by row."""
    found = {}
    for k, m, item in np.argwhere(batch.pair_weight > 0).tolist():
        index = int(batch.pair_row[k, m, item])
        pair, owner = data[index], batch.logp_pair[k, m]
        sides = (
            _completion(logps[k, m, owner == 2 * item + side], mask, pair, name)
            for side, ((_, mask), name) in enumerate(zip(completions_of(pair), ("chosen", "rejected"), strict=True))
        )
        found[index] = (next(sides), next(sides))
    return found


def _completion(values: np.ndarray, mask: np.ndarray, pair: AnyPair, name: str) -> np.ndarray:
    """Values of all tokens of a completion: 0 for those that are not learnt, and for a first without a token before."""
    learnt = np.flatnonzero(mask)
    # One value fewer than tokens where the completion starts its sequence, as nothing predicts that token.
    learnt = learnt[len(learnt) - len(values) :]
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(
            f"the reference's log-prob of token {learnt[bad]} of the {name} completion of {pair.origin} is "
            f"{values[bad]}; check the weights of the reference model. Nothing of its shard was kept"
        )
    found = np.zeros(len(mask), values.dtype)
    found[learnt] = values
    return found


@functools.lru_cache(maxsize=2)
def _compiled(model: Transformer, mesh: Mesh) -> Callable[[Params, PackedBatch], Array]:
    """The jitted function (params, batch [k, m, ...]) -> log-probs [k, m, c]."""
    logps_fn = PackedLogps(model, mesh)

    def logps(params: Params, batch: PackedBatch) -> Array:
        return jax.lax.map(lambda micro: logps_fn(params, micro, False)[0], batch)

    jitted = jax.jit(
        logps,
        in_shardings=(None, micro_batch_sharding(mesh)),  # weights keep their shardings
        out_shardings=replicated(mesh),
    )
    return OnMesh(mesh, jitted)
