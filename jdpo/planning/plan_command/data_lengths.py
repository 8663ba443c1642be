"""Lengths of a run's rows from its data: out of the cache of tokenized rows, or tokenized now."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from jdpo.config import DataSettings, OptimizationSettings
from jdpo.data.batching.mixing import check_data_settings
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.planning.plan_command.row_lengths import RowLengths
from jdpo.reports.progress import RowCounter
from jdpo.training.setup.row_order import plan_rows, preparation_of, sides_of
from jdpo.words import figure

Log = Callable[[str], None]


class _NotCached(Exception):
    """Rows would have to be tokenized."""


def lengths_of_data(
    settings: DataSettings,
    optimization: OptimizationSettings,
    tokenizer: Tokenizer,
    log: Log,
    *,
    pairs: bool,
    tokenize: bool,
) -> RowLengths:
    """Returns the lengths of the rows of an epoch, out of the cache of tokenized rows, or tokenized now.

    Args:
      log: takes lines for the user.
      pairs: True for pairs, False for completions.
      tokenize: False: only the cache is read.

    Raises:
      ValueError: the rows cannot be read, or are not in the cache and may not be tokenized.
    """
    check_data_settings(settings, pairs=pairs)
    read = preparation_of(settings, pairs=pairs)
    training, evaluation = sides_of(settings)
    began = time.monotonic()
    try:
        data, *held_out = (
            read(datasets, tokenizer, part=part).load(RowCounter(log) if tokenize else _refuse)
            for datasets, part in filter(None, (training, evaluation))
        )
    except _NotCached:
        raise ValueError("they are not in the cache of tokenized rows, and --no_tokenize is given") from None
    if data.from_cache:
        source = f"the cache of tokenized rows ({figure(len(data), 'row')})"
    else:
        seconds = time.monotonic() - began
        source = f"{figure(len(data), 'row')}, tokenized in {seconds:.0f} s as the run would and kept in its cache"
    # An epoch of weighted datasets repeats some rows and leaves out others. A run logs what it is; here it only counts.
    plan = plan_rows(
        settings,
        data,
        lambda line: None,
        global_batch_size=optimization.global_batch_size,
        seed=optimization.seed,
    )
    epoch = np.concatenate([plan.step(step) for step in range(plan.steps_per_epoch)])
    return RowLengths(
        # An empty prompt counts as a token: rows of a plan have all parts.
        lengths=np.maximum(data.part_lengths()[epoch], 1),
        rows_per_epoch=len(epoch),
        num_rows=len(data) + sum(map(len, held_out)),
        source=source,
    )


def _refuse(num_rows: int, total: int | None) -> None:
    # Called after the first chunk of rows that are not in the cache, and never for rows that are.
    raise _NotCached
