"""What `jdpo sft` and `jdpo dpo` do differently: rows, batches and objective. The loop is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.config import DPOConfig, SFTConfig, TrainConfig
from jdpo.data.loader import bucket_length, collate_completions, collate_pairs
from jdpo.data.prepare import PreparedData, prepare_completions, prepare_pairs
from jdpo.data.reference_cache import ReferenceCache, reference_logps_of
from jdpo.losses.objective import ApplyFn, metric_names
from jdpo.losses.settings import DEFAULTS, OFF, LossSettings, loss_settings
from jdpo.training.step import Batch, Objective, dpo_objective, sft_objective
from jdpo.types import TokenizedCompletion, TokenizedPair

DEFAULT_MICRO_TOKENS = 16384
"""Padded tokens of a device's micro-batch when micro_batch_size is not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A training command.

    Attributes:
      command: "sft" or "dpo".
      unit: what a row is called in metrics and messages.
      sequences: sequences the model sees for each row.
      metrics: names that an evaluation gives, without their eval_.
      loss: the preference losses and their options, or None.
      prepare: (datasets, tokenizer, *, progress) -> tokenized rows.
      collate: (rows, *, num_slots, length, pad_token_id) -> a batch of numpy arrays.
      count_tokens: real tokens of a row, over all its sequences.
      objective: apply_fn -> what is minimised.
    """

    command: str
    unit: str
    sequences: int
    metrics: tuple[str, ...]
    loss: LossSettings | None
    prepare: Callable[..., PreparedData]
    collate: Callable[..., Batch]
    count_tokens: Callable[[Any], int]
    objective: Callable[[ApplyFn], Objective]

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss is not None and self.loss.needs_reference


def loss_of(config: DPOConfig) -> LossSettings:
    """The losses of a config.

    Raises:
      ValueError: losses and options that do not go together.
    """
    options = {name: getattr(config, name) for name in (*DEFAULTS, *OFF) if hasattr(config, name)}
    loss_type = config.loss_type[0] if len(config.loss_type) == 1 else config.loss_type
    return loss_settings(loss_type, beta=config.beta, **options)[0]


def task_for(config: TrainConfig) -> Task:
    """The task of a config, by its class.

    Raises:
      ValueError: loss options that do not go together.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else None
    if isinstance(config, DPOConfig):
        loss = loss_of(config)
        return Task(
            command="dpo",
            unit="pairs",
            sequences=2,
            metrics=metric_names(loss),
            loss=loss,
            prepare=partial(
                prepare_pairs,
                max_length=config.max_length,
                max_prompt_length=config.max_prompt_length,
                cache_dir=cache_dir,
            ),
            collate=collate_pairs,
            count_tokens=count_pair_tokens,
            objective=partial(dpo_objective, settings=loss),
        )
    assert isinstance(config, SFTConfig), type(config)
    return Task(
        command="sft",
        unit="rows",
        sequences=1,
        metrics=("loss",),
        loss=None,
        prepare=partial(
            prepare_completions,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            cache_dir=cache_dir,
            loss_on=config.loss_on,
        ),
        collate=collate_completions,
        count_tokens=count_completion_tokens,
        objective=sft_objective,
    )


def count_pair_tokens(pair: TokenizedPair) -> int:
    """Real tokens of the two sequences of a pair: 2P + C + R."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def count_completion_tokens(row: TokenizedCompletion) -> int:
    """Real tokens of a supervised row."""
    return len(row.tokens)


class BatchLayout(NamedTuple):
    """How a step's rows lie in a batch: `num_micro` micro-batches of `rows_per_micro` rows over all shards."""

    num_micro: int
    rows_per_micro: int

    @property
    def num_slots(self) -> int:
        return self.num_micro * self.rows_per_micro


def batch_layout(
    global_batch_size: int, *, micro_batch_size: int | None, num_shards: int, row_tokens: int
) -> BatchLayout:
    """Cuts a global batch into the fewest micro-batches that respect `micro_batch_size`, equally large.

    Args:
      global_batch_size: rows a step; a multiple of num_shards.
      micro_batch_size: most rows of one shard at once; None: as many as DEFAULT_MICRO_TOKENS holds.
      num_shards: parts that a micro-batch is split into.
      row_tokens: padded tokens of one row at most.

    >>> batch_layout(64, micro_batch_size=3, num_shards=8, row_tokens=2048)
    BatchLayout(num_micro=3, rows_per_micro=24)
    """
    most = micro_batch_size or max(1, DEFAULT_MICRO_TOKENS // row_tokens)
    per_shard = global_batch_size // num_shards
    num_micro = -(-per_shard // most)
    return BatchLayout(num_micro, -(-per_shard // num_micro) * num_shards)


def make_batch(
    task: Task,
    data: PreparedData,
    indices: np.ndarray,
    layout: BatchLayout,
    *,
    max_length: int,
    pad_token_id: int,
    cache: ReferenceCache | None = None,
) -> tuple[Batch, int]:
    """A step's batch as numpy arrays [k, m, ...], and its real tokens.

    Args:
      indices: data rows of the step, at most layout.num_slots; the slots left over are padding rows of weight 0.
      max_length: the longest sequence of the run; the step's own longest decides the padded length.
      cache: the reference's log-probs of `data`, to travel with the batch.
    """
    rows = [data[int(index)] for index in indices]
    length = bucket_length(int(data.lengths[indices].max()), max_length)
    flat = task.collate(rows, num_slots=layout.num_slots, length=length, pad_token_id=pad_token_id)
    if cache is not None:
        logps = reference_logps_of(cache, rows, indices, num_slots=layout.num_slots, length=length)
        flat = flat._replace(reference_logps=logps)
    batch = jax.tree.map(lambda array: array.reshape(*layout, *array.shape[1:]), flat)
    return batch, sum(map(task.count_tokens, rows))
