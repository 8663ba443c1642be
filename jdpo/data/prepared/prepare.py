"""Tokenized rows of datasets: read, recognised, tokenized and counted once, and taken from the cache afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Required, TypedDict, Unpack

from jdpo.config import DatasetConfig
from jdpo.data.prepared.chunks import DROPPED, KEPT, READ, Recipe
from jdpo.data.prepared.held_out import Part
from jdpo.data.prepared.prepared_data import PreparedData
from jdpo.data.prepared.token_entry import Progress, TokenEntry
from jdpo.data.schemas import formats
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import AnyPair, TokenizedCompletion

__all__ = [
    "DROPPED",
    "KEPT",
    "READ",
    "PreparedData",
    "cache_folder",
    "completions_entry",
    "pairs_entry",
    "prepare_completions",
    "prepare_pairs",
]


class RowOptions(TypedDict, total=False):
    """The keyword arguments of `pairs_entry` and `completions_entry`."""

    max_length: Required[int]
    max_prompt_length: int | None
    loss_on: tokenize.LossOn
    part: Part | None
    num_proc: int | None
    cache_dir: Path | None


def pairs_entry(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: tokenize.LossOn = "completion",
    part: Part | None = None,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
) -> TokenEntry:
    """Returns the entry of preference rows in the cache of tokenized rows.

    Args:
      datasets: the datasets, whose rows follow one another.
      tokenizer: see `load_tokenizer`.
      max_length: maximum number of tokens of prompt and completion together.
      max_prompt_length: maximum number of tokens of the prompt; None: no limit.
      loss_on: "completion" learns the final assistant turn of each side; "assistant_turns" learns every assistant turn
        after the turns that the sides share, and gives rows of the type `MaskedPair`.
      part: the side of the train/eval split to keep; None: all rows.
      num_proc: number of processes that tokenize; None: one for the first `ALONE_ROWS` rows, then one per core. The
        rows are the same for any number.
      cache_dir: folder of the cache; None: `$XDG_CACHE_HOME/jdpo`, or ~/.cache/jdpo without that variable.

    Raises:
      ValueError: files are missing or cannot be read.
    """
    recipe = Recipe(
        kind="pairs",
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        loss_on=loss_on,
        readings=tuple(formats.reading_of(dataset, every_turn=loss_on == "assistant_turns") for dataset in datasets),
        part=part,
    )
    return TokenEntry.find(datasets, tokenizer, recipe, num_proc=num_proc, folder=_folder(cache_dir))


def completions_entry(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: tokenize.LossOn = "completion",
    part: Part | None = None,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
) -> TokenEntry:
    """Returns the entry of supervised rows in the cache of tokenized rows.

    Args:
      loss_on: "completion" learns the final assistant turn, "assistant_turns" every one. For the other arguments and
        errors see `pairs_entry`.
    """
    recipe = Recipe(
        kind="completions",
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        loss_on=loss_on,
        readings=tuple(map(formats.reading_of, datasets)),
        part=part,
    )
    return TokenEntry.find(datasets, tokenizer, recipe, num_proc=num_proc, folder=_folder(cache_dir))


def prepare_pairs(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    **options: Unpack[RowOptions],
) -> PreparedData[AnyPair]:
    """Reads and tokenizes preference rows, or takes them from the cache.

    Args:
      progress: called after every chunk; see `Progress`. For the other arguments see `pairs_entry`.

    Raises:
      ValueError: rows cannot be read, none is left to train on, or all have a fault that ruins a model; the message
        says where and why.
    """
    return pairs_entry(datasets, tokenizer, **options).load(progress)


def prepare_completions(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    **options: Unpack[RowOptions],
) -> PreparedData[TokenizedCompletion]:
    """Reads and tokenizes supervised rows, or takes them from the cache.

    Args:
      progress: see `prepare_pairs`, also for errors. For the other arguments see `completions_entry`.
    """
    return completions_entry(datasets, tokenizer, **options).load(progress)


def _folder(cache_dir: Path | None) -> Path:
    return cache_folder(cache_dir) / "tokenized"


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Returns the folder that `cache_dir` of a config names; None: `$XDG_CACHE_HOME/jdpo` or ~/.cache/jdpo."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdpo"
