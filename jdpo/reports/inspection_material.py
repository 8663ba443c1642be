"""What an inspection needs of a run: its rows as training will have them, and what stands in their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdpo.config import DatasetConfig, SFTConfig, TrainConfig
from jdpo.data import formats, sources, splitting
from jdpo.data.inspection_text import TextFacts, text_facts
from jdpo.data.loader import RowPlan
from jdpo.data.mixing import check_data_settings, mixture_of
from jdpo.data.prepare import PreparedData, prepare_completions, prepare_pairs
from jdpo.data.tokenizer import Tokenizer, load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.hub import resolve_folder
from jdpo.reports.progress import RowCounter

MOST_STEPS = 2000
"""Steps whose costs are counted: an epoch's, or the first of it."""

Say = Callable[[str], None]


class ModelFacts(NamedTuple):
    """What config.json says: positions the model has, rows of its embedding; None with the reason in `problem`."""

    max_positions: int | None
    vocab_size: int | None
    problem: str | None


class Part(NamedTuple):
    """Training rows, or evaluation rows.

    Attributes:
      data: as training will have them.
      texts: what the raw rows of each data set say; empty where they are those of the training rows.
    """

    data: PreparedData
    texts: tuple[TextFacts, ...]


class Material(NamedTuple):
    """What a report is made from.

    Attributes:
      command: "dpo" or "sft".
      chosen_by: why it is that command, in words.
      steps: the rows of each step of the first epoch, of MOST_STEPS at most.
      epoch: what an epoch is, in words.
      steps_per_epoch, num_steps: of the run.
    """

    config: TrainConfig
    command: str
    chosen_by: str
    tokenizer: Tokenizer
    model: ModelFacts
    train: Part
    eval: Part | None
    steps: Sequence[np.ndarray]
    epoch: str
    steps_per_epoch: int
    num_steps: int


def gather(config: TrainConfig, *, command: str, chosen_by: str, say: Say) -> Material:
    """Prepares the rows of a run, through the same cache as training, and reads their texts.

    Of the model only tokenizer and config.json are read; no accelerator is touched and output_dir is not written.

    Args:
      say: takes lines for the person who waits.

    Raises:
      ValueError: settings that do not go together, no tokenizer, or rows that cannot be read.
    """
    check_data_settings(config)
    folder = resolve_folder(config.model_name_or_path, config.model_revision, weights=False)
    tokenizer = load_tokenizer(folder, chat_template=config.chat_template)
    train, held_out = _parts(config, tokenizer, say)
    mixture = mixture_of(config.datasets, train.data.num_rows_of, num_examples=config.num_examples)
    plan = RowPlan(
        mixture,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        lengths=train.data.lengths if config.group_by_length else None,
    )
    return Material(
        config=config,
        command=command,
        chosen_by=chosen_by,
        tokenizer=tokenizer,
        model=_model_facts(folder),
        train=train,
        eval=held_out,
        steps=[plan.step(step) for step in range(min(plan.steps_per_epoch, MOST_STEPS))],
        epoch=mixture.describe(train.data.names),
        steps_per_epoch=plan.steps_per_epoch,
        num_steps=config.max_steps or math.ceil(round(config.num_train_epochs * plan.steps_per_epoch, 6)),
    )


def _parts(config: TrainConfig, tokenizer: Tokenizer, say: Say) -> tuple[Part, Part | None]:
    fraction = config.eval_fraction
    side = partial(splitting.Part, fraction=fraction) if fraction else lambda side: None
    train = Part(
        _prepared(config, config.datasets, tokenizer, side("train"), say),
        _texts(config, config.datasets, tokenizer, say),
    )
    if fraction:
        return train, Part(_prepared(config, config.datasets, tokenizer, side("eval"), say), ())
    if not config.eval_datasets:
        return train, None
    return train, Part(
        _prepared(config, config.eval_datasets, tokenizer, None, say),
        _texts(config, config.eval_datasets, tokenizer, say),
    )


def _prepared(
    config: TrainConfig,
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    part: splitting.Part | None,
    say: Say,
) -> PreparedData:
    options: dict[str, Any] = {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "cache_dir": Path(config.cache_dir) if config.cache_dir else None,
        "progress": RowCounter(say),
        "part": part,
        "num_proc": config.dataset_num_proc,
    }
    if isinstance(config, SFTConfig):
        return prepare_completions(datasets, tokenizer, loss_on=config.loss_on, **options)
    return prepare_pairs(datasets, tokenizer, **options)


def _texts(
    config: TrainConfig, datasets: Sequence[DatasetConfig], tokenizer: Tokenizer, say: Say
) -> tuple[TextFacts, ...]:
    supervised = isinstance(config, SFTConfig)
    found = []
    for dataset in datasets:
        reading = formats.reading_of(dataset)
        read = formats.completion_rows if supervised else formats.preference_rows
        found.append(
            text_facts(
                sources.open_source(dataset).rows(),
                partial(read, reading=reading),  # type: ignore[arg-type]
                partial(formats.schema_name, reading=reading, supervised=supervised),
                tokenizer.special_text,
                RowCounter(lambda line: say(line.replace("tokenizing", "looking at texts", 1))),
            )
        )
    return tuple(found)


def _model_facts(folder: Path) -> ModelFacts:
    try:
        found = read_model_config(folder)
    except ValueError as error:
        return ModelFacts(None, None, str(error))
    return ModelFacts(found.max_positions, found.vocab_size, None)
