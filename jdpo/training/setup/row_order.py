"""The rows of a run: where they are, split into training and evaluation, and put in the order of the steps.

Imports no jax, so that `jdpo inspect` works on machines without accelerators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.config import DatasetConfig, DataSettings
from jdpo.data.batching.loader import RowPlan
from jdpo.data.batching.mixing import mixture_of
from jdpo.data.prepared.held_out import Part
from jdpo.data.prepared.prepare import PreparedData, completions_entry, pairs_entry
from jdpo.data.prepared.token_entry import TokenEntry
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal

Log = Callable[[str], None]
"""Takes lines for the user."""


class BuildStopped(Exception):
    """A signal ended the work before the first step."""


def preparation_of(settings: DataSettings, *, pairs: bool) -> Callable[..., TokenEntry]:
    """Returns the function that finds a run's rows: (datasets, tokenizer, *, part) -> their entry in the cache."""
    options: dict[str, Any] = {
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
        "num_proc": settings.dataset_num_proc,
        "cache_dir": Path(settings.cache_dir) if settings.cache_dir else None,
    }
    return partial(pairs_entry if pairs else completions_entry, loss_on=settings.loss_on, **options)


Side = tuple[Sequence[DatasetConfig], Part | None]
"""Datasets, and which part of their rows is used; None: all rows."""


def sides_of(settings: DataSettings) -> tuple[Side, Side | None]:
    """Returns the training side and the evaluation side, which may be None."""
    fraction, datasets = settings.eval_fraction, settings.datasets
    if fraction:
        return (datasets, Part("train", fraction)), (datasets, Part("eval", fraction))
    return (datasets, None), (settings.eval_datasets, None) if settings.eval_datasets else None


def check_images(data: PreparedData, tokens: Sequence[int], tokenizer: Tokenizer) -> None:
    """Refuses rows that have a place for an image.

    Args:
      tokens: those that stand for an image or a video, see `jdpo.models.families.image_tokens`.
      tokenizer: that of the rows.

    Raises:
      ValueError: naming the first row with such a token.
    """
    for token, (num_rows, first) in data.rows_with(np.array(tokens, np.int64)).items():
        text = terminal(tokenizer.hf.convert_ids_to_tokens(token))
        raise ValueError(
            f"{data[first].origin}: the row has {text}, in whose place the model gets an image: jdpo trains on text "
            f"alone, also of a multimodal model ({num_rows:,} of {len(data):,} rows have it). Remove such rows"
        )


def check_scores(data: PreparedData) -> None:
    """Refuses rows whose `margins` an offset in the loss (margin_gamma) cannot read.

    Raises:
      ValueError: naming the first row without scores, or whose chosen answer is not scored higher.
    """
    bad = np.flatnonzero(~(data.margins > 0))  # NaN, where there are no scores, is not above 0
    if bad.size == 0:
        return
    first = int(bad[0])
    margin = float(data.margins[first])
    found = "no scores" if np.isnan(margin) else f"a score difference of {margin:g}"
    raise ValueError(
        f"{data[first].origin}: margin_gamma needs pairs whose chosen answer is scored higher than the rejected one, "
        f"but this row has {found} ({bad.size:,} of {len(data):,} rows cannot be used). Name the columns score_chosen "
        "and score_rejected in column_map, drop pairs of equal scores with min_margin, or leave margin_gamma out"
    )


def plan_rows(settings: DataSettings, data: PreparedData, log: Log, *, global_batch_size: int, seed: int) -> RowPlan:
    """Plans which rows each step has, and logs what an epoch is unless it is every row once.

    Args:
      data: the training rows.
      global_batch_size: rows per step.
      seed: of the order.

    Raises:
      ValueError: a dataset has no rows for its share of an epoch.
    """
    mixture = mixture_of(settings.datasets, data.num_rows_of, num_examples=settings.num_examples)
    if len(data.names) > 1 or mixture.takes != mixture.sizes:
        log(mixture.describe(data.names))
    return RowPlan(
        mixture,
        global_batch_size=global_batch_size,
        seed=seed,
        shuffle=settings.shuffle,
        lengths=data.lengths if settings.group_by_length else None,
    )


def num_steps_of(num_epochs: float, steps_per_epoch: int) -> int:
    """Returns the steps of a number of epochs, rounded up, except for what floating point adds to the product.

    >>> num_steps_of(1.1, 50), num_steps_of(0.5, 3)
    (55, 2)
    """
    # 1.1 * 50 is 55.00000000000001, which must not become 56 steps.
    return math.ceil(round(num_epochs * steps_per_epoch, 6))
