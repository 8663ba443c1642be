"""Scoring of rows by a model without gradients: the packed rows of training, in batches of few shapes.

The reference cache, `jdpo eval`, `jdpo compare` and reward models all read rows this way.

Axes: k micro-batches, m rows of slots, c scored tokens of a row; see `jdpo.types.PackedBatch`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import ItemSizes, PackingPlan, plan_run
from jdpo.data.reference_cache.scores import RowLogps
from jdpo.models.transformer import Params, Transformer, Weights, most_sequences_per_row, padded_row_length
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.step.objectives import PackedLogps
from jdpo.types import PackedBatch, completions_of

Array = Any

TOKENS_PER_DEVICE = 8192
"""Slots of a device's part of a batch, if there is no other limit: a forward pass keeps little, and more slots are not
faster."""


class Rows(Protocol):
    """Pairs or supervised rows by number: a list, or `PreparedData`."""

    def __getitem__(self, index: int, /) -> Any: ...


class ScoringPlan(NamedTuple):
    """Batches of the rows to score.

    Attributes:
      rows: all rows, of which a plan may score a part.
      steps: the rows of each batch, by the part that they are in.
      packing: how the rows of a batch are packed.
    """

    rows: Rows
    steps: dict[range, list[np.ndarray]]
    packing: PackingPlan

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """Packs the rows `indices`."""
        return pack_step([self.rows[int(index)] for index in indices], indices, self.packing.step(indices))


class PackedScorer:
    """A function of weights and packed rows, run over many rows; one batch is computed while the next is packed."""

    def __init__(
        self,
        function: Callable[[Any, PackedBatch], Any],
        mesh: Mesh,
        load_weights: Callable[[], Any],
        *,
        model: Transformer,
        max_tokens_per_device: int | None = None,
        micro_batch_size: int | None = None,
        check_stopped: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          function: from `over_micro_batches` or `packed_logps`.
          mesh: of the weights.
          load_weights: returns what `function` takes first, on the mesh. It is called when the first batch is computed;
            the weights are freed with this object.
          model: whose attention decides how sequences share rows.
          max_tokens_per_device: slots of a device's part of a batch at most; None: TOKENS_PER_DEVICE.
          micro_batch_size: rows of a device's part of a batch at most; replaces max_tokens_per_device.
          check_stopped: called between batches; what it raises ends the scoring.
        """
        self._function, self._mesh, self._load_weights = function, mesh, load_weights
        self._num_shards = num_batch_shards(mesh)
        self._max_tokens, self._micro_batch_size = max_tokens_per_device or TOKENS_PER_DEVICE, micro_batch_size
        self._model, self.check_stopped = model, check_stopped

    def plan(self, rows: Rows, sizes: ItemSizes, parts: Sequence[range]) -> ScoringPlan:
        """Cuts rows into batches of few shapes.

        Args:
          sizes: of all rows: `PreparedData.sizes()`, or `item_sizes` of a list.
          parts: the rows of each later call of `run`.
        """
        steps = {part: self._cut(sizes, part) for part in parts}
        packing = plan_run(
            sizes,
            (indices for of_part in steps.values() for indices in of_part),
            num_shards=self._num_shards,
            max_tokens_per_device=self._max_tokens,
            micro_batch_size=self._micro_batch_size,
            sequences_per_row=most_sequences_per_row(self._model, int(sizes.longest.max())),
            padded_length=functools.partial(padded_row_length, self._model),
        )
        return ScoringPlan(rows, steps, packing)

    def _cut(self, sizes: ItemSizes, part: range) -> list[np.ndarray]:
        """Batches of about a full micro-batch each, the longest rows first, so that too long ones fail at once."""
        order = np.argsort(-sizes.slots[part.start : part.stop], kind="stable") + part.start
        most_rows = (self._micro_batch_size or len(part)) * self._num_shards
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

    def run(self, plan: ScoringPlan, part: range) -> Iterator[tuple[np.ndarray, PackedBatch, Any]]:
        """Yields the rows of each batch of a part, the batch, and what the function returned for it, as numpy arrays.

        Raises:
          Exception: what `check_stopped` raises.
        """
        launched: deque[tuple[np.ndarray, PackedBatch, Any]] = deque()
        for indices in plan.steps[part]:
            # Between batches, so that a signal ends a long computation soon.
            self.check_stopped()
            batch = plan.batch(indices)
            on_device = self._function(self._weights, place(batch, micro_batch_sharding(self._mesh)))
            launched.append((indices, batch, on_device))
            if len(launched) > 1:  # the device works on a batch while the host reads the one before
                yield _fetched(*launched.popleft())
        while launched:
            yield _fetched(*launched.popleft())

    @functools.cached_property
    def _weights(self) -> Any:
        return self._load_weights()


def _fetched(indices: np.ndarray, batch: PackedBatch, on_device: Any) -> tuple[np.ndarray, PackedBatch, Any]:
    return indices, batch, fetch(on_device)


def over_micro_batches(function: Callable[[Any, PackedBatch], Any], mesh: Mesh) -> Callable[[Any, PackedBatch], Any]:
    """Compiles a function of one micro-batch for a whole batch.

    Args:
      function: (weights, batch [m, ...]) -> a tree of arrays [m, ...].

    Returns:
      (weights, batch [k, m, ...]) -> a tree of arrays [k, m, ...], whole on every device.
    """

    def of_batch(weights: Any, batch: PackedBatch) -> Any:
        return jax.lax.map(lambda micro: function(weights, micro), batch)

    jitted = jax.jit(
        of_batch,
        in_shardings=(None, micro_batch_sharding(mesh)),  # weights keep their shardings
        out_shardings=replicated(mesh),
    )
    return OnMesh(mesh, jitted)


# --- log-probs


@functools.lru_cache(maxsize=2)
def packed_logps(model: Transformer, mesh: Mesh) -> Callable[[Params | Weights, PackedBatch], Array]:
    """Returns the compiled function (weights, batch [k, m, ...]) -> log-probs [k, m, c], that of training."""
    # Without gradients there is nothing to recompute.
    logps_fn = PackedLogps(model.clone(remat="none"), mesh)
    return over_micro_batches(lambda weights, micro: logps_fn(weights, micro, False)[0], mesh)


def score_pairs(
    scorer: PackedScorer, plan: ScoringPlan, part: range, progress: Callable[[int], None] = lambda num_rows: None
) -> list[RowLogps]:
    """Computes the log-probs of the completion tokens of each pair of a part of a plan.

    Args:
      scorer: with the function `packed_logps`.
      progress: called after each batch with its number of rows.

    Raises:
      FloatingPointError: a log-prob is not finite; its row is named.
    """
    found: dict[int, RowLogps] = {}
    for indices, batch, logps in scorer.run(plan, part):
        for index, (pair, sides) in sides_of_rows(plan.rows, batch, logps, num_sides=2).items():
            chosen, rejected = (
                _completion(values, mask, f"the {name} completion of {pair.origin}")
                for values, (_, mask), name in zip(sides, completions_of(pair), ("chosen", "rejected"), strict=True)
            )
            found[index] = (chosen, rejected)
        progress(len(indices))
    return [found[row] for row in part]


def score_completions(
    scorer: PackedScorer, plan: ScoringPlan, part: range, progress: Callable[[int], None] = lambda num_rows: None
) -> list[np.ndarray]:
    """Computes log-probs [t] of each `TokenizedCompletion` of a part; 0 for tokens that its mask leaves out.

    Arguments and errors are as for `score_pairs`.
    """
    found: dict[int, np.ndarray] = {}
    for indices, batch, logps in scorer.run(plan, part):
        for index, (row, (values,)) in sides_of_rows(plan.rows, batch, logps, num_sides=1).items():
            found[index] = _completion(values, row.completion_mask, f"the completion of {row.origin}")
        progress(len(indices))
    return [found[row] for row in part]


def sides_of_rows(
    rows: Rows, batch: PackedBatch, values: np.ndarray, *, num_sides: int
) -> dict[int, tuple[Any, list[np.ndarray]]]:
    """Returns each row of a batch, by its number, and the part of the values [k, m, c] that belongs to each side."""
    found = {}
    for k, m, item in np.argwhere(batch.pair_weight > 0).tolist():
        index = int(batch.pair_row[k, m, item])
        owner = batch.logp_pair[k, m]
        sides = [values[k, m, owner == num_sides * item + side] for side in range(num_sides)]
        found[index] = (rows[index], sides)
    return found


def _completion(values: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
    """Values of all tokens of a completion: 0 for those that are not learnt, and for a first without a token before."""
    learnt = np.flatnonzero(mask)
    # One value fewer than tokens where the completion starts its sequence, as nothing predicts that token.
    learnt = learnt[len(learnt) - len(values) :]
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(
            f"the log-prob of token {learnt[bad]} of {name} is {values[bad]}; check the weights of the model. Nothing "
            "of its part was kept"
        )
    found = np.zeros(len(mask), values.dtype)
    found[learnt] = values
    return found
