"""The rows of a run: tokenized, told apart into training and evaluation, and put in the order of the steps.

Imports no jax: `jdpo inspect` looks at rows where there may be none to run on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdpo.config import DatasetConfig, DPOConfig, SFTConfig, TrainConfig
from jdpo.data.batching.loader import RowPlan
from jdpo.data.batching.mixing import mixture_of
from jdpo.data.prepared.prepare import PreparedData, prepare_completions, prepare_pairs
from jdpo.data.splitting import Part
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.reports.progress import RowCounter

Say = Callable[[str], None]


class BuildStopped(Exception):
    """A signal ended the work before the first step."""


def prepare_rows(
    config: TrainConfig, tokenizer: Tokenizer, say: Say, *, stopped: Callable[[], bool] = lambda: False
) -> tuple[PreparedData, PreparedData | None]:
    """The training rows and, where the config has any, the evaluation rows; says what they are.

    Args:
      say: takes lines for the person who started the run.
      stopped: whether a signal asks to stop; asked while rows are tokenized.

    Raises:
      ValueError: rows cannot be read, or none is left.
      BuildStopped: `stopped` said so.
    """

    read = preparation_of(config)

    def prepare(datasets: Sequence[DatasetConfig], part: Part | None, title: str) -> PreparedData:
        progress = partial(_progress, RowCounter(say), stopped)
        data = read(datasets, tokenizer, part=part, progress=progress)
        say(f"{title}{data.summary()}\n  {data.cache_note}")
        return data

    training, evaluation = sides_of(config)
    return prepare(*training, ""), evaluation and prepare(*evaluation, "evaluation ")


def preparation_of(config: TrainConfig) -> Callable[..., PreparedData]:
    """How a config's rows are tokenized: (datasets, tokenizer, *, part, progress) -> tokenized rows."""
    options: dict[str, Any] = {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "num_proc": config.dataset_num_proc,
        "cache_dir": Path(config.cache_dir) if config.cache_dir else None,
    }
    assert isinstance(config, SFTConfig | DPOConfig)
    prepare = prepare_completions if isinstance(config, SFTConfig) else prepare_pairs
    return partial(prepare, loss_on=config.loss_on, **options)


Side = tuple[Sequence[DatasetConfig], Part | None]
"""Data sets and the part of their rows that is meant; None: all."""


def sides_of(config: TrainConfig) -> tuple[Side, Side | None]:
    """What is trained on, and what is evaluated on, if anything."""
    fraction = config.eval_fraction
    if fraction:
        return (config.datasets, Part("train", fraction)), (config.datasets, Part("eval", fraction))
    return (config.datasets, None), (config.eval_datasets, None) if config.eval_datasets else None


def _progress(counter: RowCounter, stopped: Callable[[], bool], num_rows: int, total: int | None) -> None:
    counter(num_rows, total)
    if stopped():
        raise BuildStopped


def plan_rows(config: TrainConfig, data: PreparedData, say: Say) -> RowPlan:
    """Which rows each step of a run has; says what an epoch is where it is not all rows, once.

    Raises:
      ValueError: a data set has no rows for its share of an epoch.
    """
    mixture = mixture_of(config.datasets, data.num_rows_of, num_examples=config.num_examples)
    if len(data.names) > 1 or mixture.takes != mixture.sizes:
        say(mixture.describe(data.names))
    return RowPlan(
        mixture,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        lengths=data.lengths if config.group_by_length else None,
    )


def num_steps_of(num_epochs: float, steps_per_epoch: int) -> int:
    """Steps of a number of epochs, rounded up, but not by what floats add to a product.

    >>> num_steps_of(1.1, 50), num_steps_of(0.5, 3)
    (55, 2)
    """
    return math.ceil(round(num_epochs * steps_per_epoch, 6))
