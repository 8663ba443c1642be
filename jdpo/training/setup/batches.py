"""The rows of a step as arrays: packed back to back, or padded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.data.batching.loader import bucket_length
from jdpo.data.batching.packing import pack_step, unused
from jdpo.data.batching.packing_plan import PackingPlan, plan_run
from jdpo.data.batching.packing_shapes import MAX_SHAPES, PackedShape
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.reference_cache.scores import ReferenceCache, reference_logps_of
from jdpo.devices import target
from jdpo.models.transformer import most_sequences_per_row, padded_row_length
from jdpo.sharding.axes import num_batch_shards
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.tasks import Task
from jdpo.training.step.objectives import Batch


class StepRows(NamedTuple):
    """The rows of a step, and where they are in its batch.

    Attributes:
      indices: int [b], the rows.
      at: int [b], the place of each row among the flattened per-row values of the step's report.
      num_tokens: real tokens of the rows, over all their sequences.
      real_slots: slots of the batch that hold a token.
      num_slots: slots of the batch, padding included.
    """

    indices: np.ndarray
    at: np.ndarray
    num_tokens: int
    real_slots: int
    num_slots: int

    @property
    def padding(self) -> float:
        """The share of the slots that hold no token."""
        return 1 - self.real_slots / self.num_slots


class StepBatch(NamedTuple):
    """The rows of a step as arrays [k, m, ...]."""

    batch: Batch
    rows: StepRows


class PaddedBatches:
    """Padded batches of one dataset: each side is a sequence of its own, padded to the longest of the step."""

    def __init__(
        self,
        task: Task,
        data: PreparedData,
        steps: Iterable[np.ndarray],
        *,
        global_batch_size: int,
        num_shards: int,
        max_tokens_per_device: int,
        micro_batch_size: int | None = None,
        max_length: int,
        pad_token_id: int,
        cache: ReferenceCache | None = None,
    ) -> None:
        """
        Args:
          steps: the rows of every step.
          global_batch_size: the most rows of a step.
          num_shards: parts that a micro-batch is split into.
          max_tokens_per_device: padded tokens of one part at most.
          micro_batch_size: rows of one part at most; replaces max_tokens_per_device.
          max_length: the longest sequence of the run.
          cache: the reference's log-probs of `data`, to travel with the batch.
        """
        self._task, self._data, self._cache = task, data, cache
        self._scores = data.margins if task.reads_scores else None
        self._max_length, self._pad_token_id, self._num_shards = max_length, pad_token_id, num_shards
        # All shapes of the run, so that each is compiled once, ahead of its step.
        self._lengths = sorted({self._length(indices) for indices in steps})
        self.layout = batch_layout(
            global_batch_size,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens_per_device,
            num_shards=num_shards,
            row_tokens=task.sequences * self._lengths[-1],
        )

    def _length(self, indices: np.ndarray) -> int:
        return bucket_length(int(self._data.lengths[indices].max()), self._max_length)

    def make(self, indices: np.ndarray) -> StepBatch:
        """Returns the batch of the rows `indices`; the remaining slots are padding of weight 0."""
        rows, length = [self._data[int(index)] for index in indices], self._length(indices)
        real = sum(map(self._task.count_tokens, rows))
        num_slots = self.layout.num_slots * self._task.sequences * length
        return StepBatch(
            self._arrays(rows, indices, length), StepRows(indices, np.arange(len(rows)), real, real, num_slots)
        )

    def like(self, indices: np.ndarray) -> Batch:
        """Returns empty arrays of the shapes that `make` returns for these rows."""
        return self._arrays([], indices[:0], self._length(indices))

    def shapes(self) -> list[Batch]:
        """Returns such arrays for every shape of the steps, the largest last."""
        return [self._arrays([], np.zeros(0, np.int64), length) for length in self._lengths]

    def demanding(self) -> list[Batch]:
        """Returns those of `shapes` that may need the most memory."""
        return self.shapes()[-1:]

    @property
    def tokens_per_device(self) -> int:
        """The slots of a device's part of the largest micro-batch."""
        per_shard = self.layout.rows_per_micro // self._num_shards
        return per_shard * self._task.sequences * self._lengths[-1]

    def _arrays(self, rows: Sequence[Any], indices: np.ndarray, length: int) -> Batch:
        layout = self.layout
        flat = self._task.collate(rows, num_slots=layout.num_slots, length=length, pad_token_id=self._pad_token_id)
        if self._cache is not None:
            logps = reference_logps_of(self._cache, rows, indices, num_slots=layout.num_slots, length=length)
            flat = flat._replace(reference_logps=logps)
        if self._scores is not None:
            # 1 on padding, since the loss takes the logarithm.
            margins = np.ones(layout.num_slots, np.float32)
            margins[: len(indices)] = self._scores[indices]
            flat = flat._replace(score_margins=margins)
        return jax.tree.map(lambda array: array.reshape(*layout, *array.shape[1:]), flat)  # [(k m), ...] -> [k, m, ...]


class PackedBatches:
    """Packed batches of one dataset: rows back to back, each prompt once, in the few shapes that a run compiles."""

    def __init__(
        self,
        task: Task,
        data: PreparedData,
        steps: Iterable[np.ndarray],
        *,
        num_shards: int,
        max_tokens_per_device: int,
        micro_batch_size: int | None = None,
        sequences_per_row: int | None = 1,
        padded_length: Callable[[int], int] = lambda length: length,
        max_shapes: int = MAX_SHAPES,
        cache: ReferenceCache | None = None,
    ) -> None:
        """
        Args:
          steps: the rows of every step.
          num_shards: parts that a micro-batch is split into.
          max_tokens_per_device: slots of one part at most.
          micro_batch_size: rows of one part at most; replaces max_tokens_per_device.
          sequences_per_row, padded_length: of attention rows; see `plan_run`.
          max_shapes: maximum number of shapes of all steps.
          cache: the reference's log-probs of `data`, to travel with the batch.
        """
        self._task, self._data, self._cache, self._num_shards = task, data, cache, num_shards
        self._scores = data.margins if task.reads_scores else None
        self.plan: PackingPlan = plan_run(
            data.sizes(),
            steps,
            num_shards=num_shards,
            max_tokens_per_device=max_tokens_per_device,
            micro_batch_size=micro_batch_size,
            sequences_per_row=sequences_per_row,
            padded_length=padded_length,
            max_shapes=max_shapes,
        )

    def make(self, indices: np.ndarray) -> StepBatch:
        """Returns the batch of the rows `indices`."""
        rows = [self._data[int(index)] for index in indices]
        reference = None
        if self._cache is not None:
            reference = [self._cache.row(int(index), row) for index, row in zip(indices, rows, strict=True)]
        step = self.plan.step(indices)
        scores = None if self._scores is None else self._scores[indices]
        batch = pack_step(rows, indices, step, reference_logps=reference, score_margins=scores)
        # Items are packed in an order of their own; `at` brings their values back into the order of `indices`.
        real = np.flatnonzero(batch.pair_weight.reshape(-1))
        in_batch = batch.pair_row.reshape(-1)[real]
        # First in the order of row numbers; argsort twice gives the rank of each row in that order.
        at = real[np.argsort(in_batch)][np.argsort(np.argsort(indices))]
        num_tokens, real_slots = sum(map(self._task.count_tokens, rows)), int(self.plan.sizes.slots[indices].sum())
        return StepBatch(batch, StepRows(indices, at, num_tokens, real_slots, batch.tokens.size))

    def like(self, indices: np.ndarray) -> Batch:
        """Returns empty arrays of the shapes that `make` returns for these rows."""
        return self._unused(self.plan.step(indices).shape)

    def shapes(self) -> list[Batch]:
        """Returns such arrays for every shape of the steps."""
        return [self._unused(shape) for shape in self.plan.shapes]

    def demanding(self) -> list[Batch]:
        """Returns those of `shapes` that may need the most memory; see `demanding_shapes`."""
        return [self._unused(shape) for shape in demanding_shapes(self.plan.shapes)]

    @property
    def tokens_per_device(self) -> int:
        """The slots of a device's part of the largest micro-batch."""
        return max(shape.num_slots for shape in self.plan.shapes) * self.plan.num_rows // self._num_shards

    def _unused(self, shape: PackedShape) -> Batch:
        dtype = None if self._cache is None else self._cache.dtype
        num_sides, with_scores = self.plan.sizes.num_sides, self._scores is not None
        return unused(shape, num_sides=num_sides, reference_dtype=dtype, with_scores=with_scores)


Batches = PaddedBatches | PackedBatches

MAX_SHAPES_ON_TPU = 4
"""Maximum number of shapes per run on TPU, where a program takes minutes to compile."""


def make_batches(
    setup: Setup,
    data: PreparedData,
    steps: Iterable[np.ndarray],
    *,
    max_tokens_per_device: int,
    cache: ReferenceCache | None,
) -> Batches:
    """Returns batches of the rows of `steps`, packed or padded as the config says.

    Args:
      cache: the reference's log-probs of `data`, to travel with the batches.
    """
    config = setup.config
    options: dict[str, Any] = {
        "num_shards": num_batch_shards(setup.mesh),
        "max_tokens_per_device": max_tokens_per_device,
        "micro_batch_size": config.micro_batch_size,
        "cache": cache,
    }
    if config.packing:
        most = MAX_SHAPES_ON_TPU if target().platform == "tpu" else MAX_SHAPES
        per_row = most_sequences_per_row(setup.model, int(data.sizes().longest.max()))
        padded = partial(padded_row_length, setup.model)
        options |= {"sequences_per_row": per_row, "padded_length": padded, "max_shapes": most}
        return PackedBatches(setup.task, data, steps, **options)
    return PaddedBatches(
        setup.task,
        data,
        steps,
        global_batch_size=config.global_batch_size,
        max_length=config.max_length,
        pad_token_id=setup.tokenizer.pad_token_id,
        **options,
    )


LOOKED_AHEAD = 256
"""Steps whose shapes are compiled in the order in which they come."""


def shapes_in_order(batches: Batches, steps: Iterable[np.ndarray]) -> list[Batch]:
    """Returns empty arrays of every shape of batches, those of the first steps first."""
    first = [batches.like(indices) for indices, _ in zip(steps, range(LOOKED_AHEAD), strict=False)]
    return first if len(first) < LOOKED_AHEAD else [*first, *batches.shapes()]


def demanding_shapes(shapes: Iterable[PackedShape]) -> list[PackedShape]:
    """Returns the shapes among which is the one that needs the most memory, whatever dominates its memory.

    No other shape has at least as many slots, attention positions and scored tokens, and accumulates gradients if
    it does.
    """
    sizes = {
        (shape.num_slots, shape.num_attention_rows * shape.length, shape.num_scored, shape.num_micro > 1): shape
        for shape in sorted(shapes)  # of equals, the one with the most micro-batches is kept
    }
    return [
        shape
        for size, shape in sizes.items()
        if not any(other != size and all(map(operator.ge, other, size)) for other in sizes)
    ]


class BatchLayout(NamedTuple):
    """The split of a step's rows: `num_micro` micro-batches of `rows_per_micro` rows, over all shards."""

    num_micro: int
    rows_per_micro: int

    @property
    def num_slots(self) -> int:
        return self.num_micro * self.rows_per_micro


def batch_layout(
    global_batch_size: int, *, micro_batch_size: int | None, max_tokens: int, num_shards: int, row_tokens: int
) -> BatchLayout:
    """Cuts a global batch into the fewest micro-batches of equal size that respect `micro_batch_size`.

    Args:
      global_batch_size: rows per step; a multiple of num_shards.
      micro_batch_size: rows of one shard at once, at most; None: as many as fit into max_tokens.
      max_tokens: padded tokens of one shard at once.
      num_shards: parts that a micro-batch is split into.
      row_tokens: padded tokens of one row at most.

    >>> batch_layout(64, micro_batch_size=3, max_tokens=16384, num_shards=8, row_tokens=2048)
    BatchLayout(num_micro=3, rows_per_micro=24)
    """
    # A row longer than the budget is computed alone.
    most = micro_batch_size or max(1, max_tokens // row_tokens)
    per_shard = global_batch_size // num_shards
    # Micro-batches of equal size waste the least padding.
    num_micro = -(-per_shard // most)
    return BatchLayout(num_micro, -(-per_shard // num_micro) * num_shards)
