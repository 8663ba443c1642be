"""Tokenized rows of datasets: read, recognised, tokenized and counted once, and taken from the cache afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdpo.config import DatasetConfig
from jdpo.data.batching.mixing import labels_of
from jdpo.data.prepared import row_store, token_checks
from jdpo.data.prepared.chunks import DROPPED, KEPT, READ, Chunk, RawChunk, Recipe, Tally, make_chunk
from jdpo.data.prepared.held_out import Part
from jdpo.data.prepared.prepared_data import PreparedData
from jdpo.data.prepared.workers import available_cores, map_in_order
from jdpo.data.schemas import formats
from jdpo.data.sources import Source, open_source
from jdpo.data.sources.json_values import text_size
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal
from jdpo.types import AnyPair, TokenizedCompletion

__all__ = [
    "DROPPED",
    "KEPT",
    "READ",
    "PreparedData",
    "cache_folder",
    "prepare_completions",
    "prepare_pairs",
]

CACHE_VERSION = 11
"""Must be raised whenever the same raw rows would give other tokens or other counts."""

CHUNK_ROWS = 512
"""A process tokenizes at most this many raw rows at a time."""

CHUNK_TEXT = 4 * 2**20
"""A chunk ends once it has this many characters, since several chunks per process are in memory."""

ALONE_ROWS = 8192
"""Rows that the first process tokenizes alone if `num_proc` is None, because starting others takes seconds."""

SAMPLE_ROWS = 3
"""Rows of each dataset that are recognised before any are tokenized, so that a wrong schema is an early error."""

Progress = Callable[[int, int | None], None]
"""Called with the number of rows read so far (dropped rows included) and the total number.

The total is None if the files do not state their number of rows. The function is called after every chunk, and not at
all if the rows come from the cache. An exception that it raises ends the work.
"""


def prepare_pairs(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: tokenize.LossOn = "completion",
    part: Part | None = None,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedData[AnyPair]:
    """Reads and tokenizes preference rows, or takes them from the cache.

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
      progress: called after every chunk; see `Progress`.

    Raises:
      ValueError: rows cannot be read, none is left to train on, or all have a fault that ruins a model; the message
        says where and why.
    """
    recipe = Recipe(
        kind="pairs",
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        loss_on=loss_on,
        readings=tuple(formats.reading_of(dataset, every_turn=loss_on == "assistant_turns") for dataset in datasets),
        part=part,
    )
    return _prepare(datasets, tokenizer, recipe, num_proc=num_proc, cache_dir=cache_dir, progress=progress)


def prepare_completions(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: tokenize.LossOn = "completion",
    part: Part | None = None,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedData[TokenizedCompletion]:
    """Reads and tokenizes supervised rows, or takes them from the cache.

    Args:
      loss_on: "completion" learns the final assistant turn, "assistant_turns" every one. For the other arguments see
        `prepare_pairs`.

    Raises:
      ValueError: as in `prepare_pairs`.
    """
    recipe = Recipe(
        kind="completions",
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        loss_on=loss_on,
        readings=tuple(map(formats.reading_of, datasets)),
        part=part,
    )
    return _prepare(datasets, tokenizer, recipe, num_proc=num_proc, cache_dir=cache_dir, progress=progress)


def _prepare(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    recipe: Recipe,
    *,
    num_proc: int | None,
    cache_dir: Path | None,
    progress: Progress | None,
) -> PreparedData[Any]:
    if not datasets:
        raise ValueError("no datasets were given")
    labels_of(datasets)  # errors in the labels come before the work
    # Opening lists files and checks paths, so that a missing file is an error before any work.
    sources = [open_source(dataset) for dataset in datasets]
    folder = cache_folder(cache_dir) / "tokenized"
    # The key needs the digest of every file, so the files are read once even if the rows are in the cache.
    key = _key(sources, tokenizer, recipe)
    rows = row_store.open_rows(folder, key, recipe.row_type)
    from_cache = rows is not None
    if rows is None:
        with row_store.writing_rows(folder, key, recipe.row_type) as writer:
            known = [source.known_rows() for source in sources] if progress is not None else []
            total = None if None in known else sum(filter(None, known))
            tally, of_sets = Tally(), [Tally() for _ in sources]
            # closing: an error here must end the processes that tokenize at once, not when the garbage collector runs.
            with contextlib.closing(_chunks(sources, tokenizer, recipe, num_proc)) as chunks:
                for chunk in chunks:
                    writer.append(chunk.block)
                    tally.take(chunk)
                    of_sets[chunk.dataset].take(chunk)
                    # Called after the chunk is written, so that a progress bar never runs ahead of the work.
                    if progress is not None:
                        progress(tally.counts[READ], total)
            _check_kept(tally, datasets, recipe.part)
            writer.about = tally.as_dict() | {"data_sets": [one.as_dict() for one in of_sets]}  # plain: as it is
        rows = row_store.open_rows(folder, key, recipe.row_type)
        if rows is None:
            raise ValueError(f"the tokenized rows written to {folder} are damaged when read again; check the disk")
    return PreparedData(rows, datasets, sources, tokenizer, from_cache=from_cache)


def _chunks(sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe, num_proc: int | None) -> Generator[Chunk]:
    """Yields the tokenized rows in their order."""
    raw = _raw_chunks(sources, recipe)
    if num_proc is None:
        yield from map_in_order(
            make_chunk, (recipe, tokenizer), itertools.islice(raw, ALONE_ROWS // CHUNK_ROWS), num_proc=1
        )
        ahead = list(itertools.islice(raw, 1))  # start further processes only if rows are left
        if not ahead:
            return
        raw, num_proc = itertools.chain(ahead, raw), available_cores()
    yield from map_in_order(make_chunk, (recipe, tokenizer), raw, num_proc=num_proc)


def _raw_chunks(sources: Sequence[Source], recipe: Recipe) -> Iterator[RawChunk]:
    for number, source in enumerate(sources):
        rows = iter(source.rows())
        samples = list(itertools.islice(rows, SAMPLE_ROWS))
        if samples:
            # One error with three sample rows is more useful than the error of the first row alone.
            supervised = recipe.kind == "completions"
            formats.check_rows(samples, recipe.readings[number], supervised=supervised)
        chunk, size = [], 0
        for row in itertools.chain(samples, rows):
            chunk.append(row)
            size += text_size(row[0])
            # Chunks follow from the rows alone, so they are the same for any number of processes.
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_TEXT:
                yield RawChunk(number, chunk)
                chunk, size = [], 0
        if chunk:
            yield RawChunk(number, chunk)


def _check_kept(tally: Tally, datasets: Sequence[DatasetConfig], part: Part | None) -> None:
    """Checks that there are rows to train on.

    Raises:
      ValueError: no row is left, or all rows have a fault that ruins a model.
    """
    if not tally.counts[KEPT]:
        lines = [f"no rows left of {', '.join(terminal(dataset.path) for dataset in datasets)}", *tally.lines()]
        # Without this hint, "no rows left" would not tell that the rows are on the other side of the split.
        if part is not None:
            lines.append(f"eval_fraction {part.fraction} leaves no rows on this side; change or remove it")
        raise ValueError("\n".join(lines))
    token_checks.refuse_ruined(tally.counts, tally.counts[KEPT], tally.examples)


def _key(sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe) -> str:
    parts = {
        "version": CACHE_VERSION,
        "rows": [source.digest() for source in sources],
        "tokenizer": tokenizer.digest,
        # Another version of these may tokenize or render differently.
        "libraries": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "recipe": dataclasses.asdict(recipe),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Returns the folder that `cache_dir` of a config names; None: `$XDG_CACHE_HOME/jdpo` or ~/.cache/jdpo."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdpo"
