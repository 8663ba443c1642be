"""The question of `jdpo plan`, which every target answers: a model, the lengths of rows, steps and prices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

from jdpo.config import DPOConfig, OptimizerConfig, TrainConfig
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.planning.plan_command.data_lengths import lengths_of_data
from jdpo.planning.plan_command.given_lengths import check_lengths, read_lengths
from jdpo.planning.plan_command.prices import Prices
from jdpo.planning.plan_command.row_lengths import RowLengths, alike, listed_rows
from jdpo.planning.plan_command.run_length import RunLength, run_length
from jdpo.training.setup.model_sources import Sources, find_sources
from jdpo.training.setup.tasks import task_for


class Question(NamedTuple):
    """The question that is answered for every target.

    Attributes:
      command: the training command, dpo or sft.
      model: as the config names it.
      rows_per_step: of all devices.
      optimizer: that of the config.
      rows_per_device: `micro_batch_size`.
    """

    command: str
    model: str
    rows_per_step: int
    optimizer: OptimizerConfig
    rows_per_device: int | None
    rows: RowLengths
    run: RunLength
    prices: Prices | None


def model_sources(config: TrainConfig) -> Sources:
    """Returns the model's folder, which may hold config.json alone.

    Raises:
      ValueError: there is none, it has no config.json, or it is an adapter.
    """
    try:
        sources = find_sources(config, weights=False)
    except ValueError as error:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model_name_or_path):  # no name on the hub
            raise ValueError(f"{error}. A plan needs config.json alone") from error
        raise ValueError(
            f"{error}. A plan needs config.json alone: `hf download {config.model_name_or_path} config.json "
            "--local-dir FOLDER` fetches it where there is a network; then give model_name_or_path=FOLDER and --lengths"
        ) from error
    if not (sources.model_folder / "config.json").is_file():
        raise ValueError(f"model_name_or_path {sources.name}: expected a folder with a config.json")
    if sources.adapter_folder is not None:
        raise ValueError(
            f"a plan of a run that continues from an adapter ({sources.adapter_folder}) is not made; plan one that "
            f"starts a new adapter of the same rank: model_name_or_path={sources.model_folder} lora.r=RANK"
        )
    return sources


def row_lengths(
    config: TrainConfig,
    sources: Sources,
    given: str | None,
    log: Callable[[str], None],
    *,
    pairs: bool,
    tokenize: bool,
) -> RowLengths:
    """Returns the lengths of the rows: those that are given, or those of the config's data.

    Args:
      given: the value of --lengths.
      log: takes lines for the user.
      pairs: True for pairs, False for completions.
      tokenize: False to read only the cache of tokenized rows.

    Raises:
      ValueError: they cannot be read.
    """
    if given is not None:
        lengths = read_lengths(given)
        check_lengths(lengths, pairs=pairs, max_length=config.max_length)
        if not given.endswith(".csv"):
            return alike(lengths[0], source="--lengths")
        return listed_rows(lengths, source=given)
    try:
        tokenizer = load_tokenizer(
            sources.tokenizer_folder,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        return lengths_of_data(config, config, tokenizer, log, pairs=pairs, tokenize=tokenize)
    except (OSError, ValueError) as error:
        example = "512,300,300, for prompt, chosen and rejected" if pairs else "812, for a row"
        raise ValueError(
            f"the lengths of the rows are needed, and those of the config cannot be had here: {error}\n"
            f"Give --lengths, such as --lengths {example}, or a CSV file"
        ) from error


def question_of(
    task: str, config: TrainConfig, sources: Sources, rows: RowLengths, num_rows: int | None, prices: Prices | None
) -> tuple[Question, TrainConfig]:
    """Returns what is asked of every target, and the config with the model's folder and a settled reference."""
    dpo = config if isinstance(config, DPOConfig) else None
    run = run_length(config, dpo, task_for(config), rows, num_rows=num_rows)
    if dpo is not None and run.reference != dpo.reference:
        config = dataclasses.replace(dpo, reference=run.reference)
    question = Question(
        command=task,
        model=sources.name,
        rows_per_step=config.global_batch_size,
        optimizer=config.optimizer,
        rows_per_device=config.micro_batch_size,
        rows=dataclasses.replace(rows, rows_per_epoch=num_rows or rows.rows_per_epoch),
        run=run,
        prices=prices,
    )
    return question, dataclasses.replace(config, model_name_or_path=str(sources.model_folder))
