"""The rows of a run: tokenized, told apart into training and evaluation, and put in the order of the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jdpo.config import DatasetConfig, TrainConfig
from jdpo.data.loader import RowPlan
from jdpo.data.mixing import mixture_of
from jdpo.data.prepare import PreparedData
from jdpo.data.splitting import Part
from jdpo.data.tokenizer import Tokenizer
from jdpo.reports.progress import RowCounter
from jdpo.training.interrupt import BuildStopped
from jdpo.training.tasks import Task

Say = Callable[[str], None]


def prepare_rows(
    config: TrainConfig, task: Task, tokenizer: Tokenizer, say: Say, *, stopped: Callable[[], bool] = lambda: False
) -> tuple[PreparedData, PreparedData | None]:
    """The training rows and, where the config has any, the evaluation rows; says what they are.

    Args:
      say: takes lines for the person who started the run.
      stopped: whether a signal asks to stop; asked while rows are tokenized.

    Raises:
      ValueError: rows cannot be read, or none is left.
      BuildStopped: `stopped` said so.
    """

    def prepare(datasets: Sequence[DatasetConfig], part: Part | None, title: str) -> PreparedData:
        progress = partial(_progress, RowCounter(say), stopped)
        data = task.prepare(datasets, tokenizer, part=part, progress=progress)
        say(f"{title}{data.summary()}\n  {data.cache_note}")
        return data

    fraction = config.eval_fraction
    train = prepare(config.datasets, Part("train", fraction) if fraction else None, "")
    if fraction:
        return train, prepare(config.datasets, Part("eval", fraction), "evaluation ")
    return train, prepare(config.eval_datasets, None, "evaluation ") if config.eval_datasets else None


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
