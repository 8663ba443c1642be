"""The frozen reference's log-probs of rows, by the packed rows and the function that training uses.

Axes: k micro-batches, m rows of slots, c scored tokens of a row; see `jdpo.types.PackedBatch`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

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
"""Slots of a device's part of a batch, where the config says nothing: a forward pass keeps little, and more is not
faster."""


class Scorer:
    """The frozen reference on the mesh, loaded when the first row is scored and freed with this object."""

    def __init__(self, setup: Setup, stopped: Callable[[], bool]) -> None:
        self._setup, self._stopped = setup, stopped
        self._num_shards = num_batch_shards(setup.mesh)
        self._budget = setup.config.max_tokens_per_device or TOKENS_PER_DEVICE

    def check_stopped(self) -> None:
        """
        Raises:
          BuildStopped: a signal asks for it.
        """
        if self._stopped():
            raise BuildStopped

    def plan(self, data: PreparedData, parts: Sequence[range]) -> None:
        """Lays out the rows that are to be scored, so that all of them come in few shapes.

        Args:
          parts: the rows of each later call of `score`.
        """
        sizes = data.sizes()
        self._data = data
        self._steps = {rows: self._cut(sizes, rows) for rows in parts}
        self._batches = PackedBatches(
            self._setup.task,
            data,
            (indices for steps in self._steps.values() for indices in steps),
            num_shards=self._num_shards,
            max_tokens_per_device=self._budget,
            micro_batch_size=self._setup.config.micro_batch_size,
        )

    def _cut(self, sizes: ItemSizes, rows: range) -> list[np.ndarray]:
        """Batches of about a full micro-batch each, the longest rows first: what does not fit shows at once."""
        order = np.argsort(-sizes.slots[rows.start : rows.stop], kind="stable") + rows.start
        most_rows = (self._setup.config.micro_batch_size or len(rows)) * self._num_shards
        room = self._budget * self._num_shards
        batches: list[list[int]] = []
        used = room
        for index in order.tolist():
            slots = int(sizes.slots[index])
            if used + slots > room or len(batches[-1]) == most_rows:
                batches.append([])
                used = 0
            batches[-1].append(index)
            used += slots
        return [np.array(batch) for batch in batches]

    def score(self, rows: range, progress: Callable[[int], None]) -> list[RowLogps]:
        """The log-probs of the completion tokens of each row of one of the parts of `plan`.

        Args:
          progress: told after each batch how many rows it had.

        Raises:
          FloatingPointError: one is not finite; its row is named.
        """
        scored: dict[int, RowLogps] = {}
        under_way: deque[tuple[np.ndarray, PackedBatch, Array]] = deque()

        def take() -> None:
            indices, batch, on_device = under_way.popleft()
            scored.update(self._rows_of(batch, fetch(on_device)))
            progress(len(indices))

        for indices in self._steps[rows]:
            self.check_stopped()
            batch = self._batches.make(indices).batch
            under_way.append((indices, batch, self._launch(batch)))
            if len(under_way) > 1:  # the device works on a batch while the host is at the one before
                take()
        while under_way:
            take()
        return [scored[row] for row in rows]

    def _launch(self, batch: PackedBatch) -> Array:
        setup = self._setup
        logps = _compiled(setup.model.clone(remat="none"), setup.mesh)
        return logps(self._params, place(batch, micro_batch_sharding(setup.mesh)))

    @functools.cached_property
    def _params(self) -> Params:
        return load_reference_weights(self._setup)

    def _rows_of(self, batch: PackedBatch, logps: np.ndarray) -> dict[int, RowLogps]:
        """[k, m, c] of a batch as the values of each completion, by row."""
        found = {}
        for k, m, item in np.argwhere(batch.pair_weight > 0).tolist():
            index = int(batch.pair_row[k, m, item])
            pair, owner = self._data[index], batch.logp_pair[k, m]
            sides = (
                _completion(logps[k, m, owner == 2 * item + side], mask, pair, name)
                for side, ((_, mask), name) in enumerate(zip(completions_of(pair), ("chosen", "rejected"), strict=True))
            )
            found[index] = (next(sides), next(sides))
        return found


def _completion(values: np.ndarray, mask: np.ndarray, pair: AnyPair, name: str) -> np.ndarray:
    """Values of all tokens of a completion: 0 for those that are not learnt, and for a first that nothing precedes."""
    places = np.flatnonzero(mask)
    places = places[len(places) - len(values) :]
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(
            f"the reference's log-prob of token {places[bad]} of the {name} completion of {pair.origin} is "
            f"{values[bad]}; is the reference model in order? Nothing of its shard was kept"
        )
    found = np.zeros(len(mask), values.dtype)
    found[places] = values
    return found


@functools.lru_cache(maxsize=2)
def _compiled(model: Transformer, mesh: Mesh) -> Callable[[Params, PackedBatch], Array]:
    """(params, batch [k, m, ...]) -> [k, m, c]; jitted."""
    logps_fn = PackedLogps(model, mesh)

    def logps(params: Params, batch: PackedBatch) -> Array:
        return jax.lax.map(lambda micro: logps_fn(params, micro, False)[0], batch)

    jitted = jax.jit(
        logps,
        in_shardings=(None, micro_batch_sharding(mesh)),  # weights as they lie
        out_shardings=replicated(mesh),
    )
    return OnMesh(mesh, jitted)
