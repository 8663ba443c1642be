"""From data sets to tokenized rows: read, recognise, tokenize, count; once, then from the cache."""

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
from typing import Any, Generic, TypeVar

import numpy as np

from jdpo.config import DatasetConfig, without_queries
from jdpo.data.batching.mixing import labels_of
from jdpo.data.batching.packing_plan import ItemSizes, completion_sizes, pair_sizes
from jdpo.data.prepared import store, token_checks
from jdpo.data.prepared.chunks import CHOSEN_LEARNT, DROPPED, KEPT, READ, Chunk, RawChunk, Recipe, Tally, make_chunk
from jdpo.data.prepared.held_out import Part
from jdpo.data.prepared.workers import available_cores, map_in_order
from jdpo.data.schemas import formats
from jdpo.data.sources import Source, open_source
from jdpo.data.sources.values import text_size
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal
from jdpo.types import AnyPair, MaskedPair, TokenizedCompletion
from jdpo.words import figure

__all__ = [
    "CHOSEN_LEARNT",
    "DROPPED",
    "KEPT",
    "READ",
    "Part",
    "PreparedData",
    "Progress",
    "cache_folder",
    "prepare_completions",
    "prepare_pairs",
]

R = TypeVar("R", bound=AnyPair | TokenizedCompletion)

CACHE_VERSION = 11
"""To be raised whenever the same rows would be tokenized to something else, or counted otherwise."""

DROPPED_UNSAID = 0.05
"""A larger share of dropped rows is stated at the end of a run, and in the model card."""

MOST_NAMES = 5
"""Files named in the summary at most."""

CHUNK_ROWS = 512
"""Raw rows that a process tokenizes at a time, at most."""

CHUNK_TEXT = 4 * 2**20
"""Characters after which no further row is taken into a chunk: a few of them are in memory for each process."""

ALONE_ROWS = 8192
"""Rows after which further processes help, where their number is left open: starting them takes seconds."""

SAMPLE_ROWS = 3
"""Rows of each data set that are recognised before all of them are."""

Progress = Callable[[int, int | None], None]
"""Told how many rows of all data sets of the call were read so far, dropped ones included, and of how many in all.

That is None where files do not say how many rows they have before they are read.
It is called after every chunk of a data set's rows, and not at all where the rows come
from the cache. What it raises ends the work.
"""


class PreparedData(Generic[R]):
    """Tokenized rows by index, memory-mapped, with what was counted on the way. Data sets follow one another.

    Attributes:
      lengths: int32 [rows], tokens of the longest sequence of each row.
      names: labels of the data sets.
      dataset_of: int32 [rows], which of them each row is of.
      prompt_keys: uint64 [rows], a hash of the prompt's text as it is in the file; see `held_out.prompt_key`.
      margins: float32 [rows], by how much the chosen side was scored higher; NaN where nobody scored.
      counts: in plain words: rows read, rows kept, dropped by reason, truncated, ...
      examples: where the first row of a count is, for most counts.
      counts_of, examples_of: the same of each data set.
      digest: content digest of the tokenized rows.
      from_cache: whether an earlier run had tokenized them.
    """

    def __init__(
        self,
        rows: store.RowStore[R],
        datasets: Sequence[DatasetConfig],
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        from_cache: bool,
    ) -> None:
        self._rows = rows
        self._datasets = tuple(datasets)
        self._sources = tuple(sources)
        self.from_cache = from_cache
        self.lengths: np.ndarray = rows.lengths
        self.names = labels_of(datasets)
        self.dataset_of, self.prompt_keys, self.margins = rows.tags
        self.counts: dict[str, int] = rows.about["counts"]
        self.examples: dict[str, str] = rows.about["examples"]
        self.counts_of: tuple[dict[str, int], ...] = tuple(one["counts"] for one in rows.about["data_sets"])
        self.examples_of: tuple[dict[str, str], ...] = tuple(one["examples"] for one in rows.about["data_sets"])
        self.digest = rows.digest
        num_cut = self.counts.get(tokenize.COMPLETION_CUT, 0)
        self._warnings = token_checks.warnings_of(self.counts, len(rows), num_cut, tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> R:
        row: R = self._rows[index]
        return row

    def sizes(self) -> ItemSizes:
        """How much room every row takes when packed; reads lengths only."""
        rows = self._rows
        if rows.row_type is TokenizedCompletion:
            return completion_sizes(rows.lengths_of("tokens"), rows.counts_of("completion_mask", skip=1))
        lengths = [rows.lengths_of(field) for field in ("prompt_ids", "chosen_ids", "rejected_ids")]
        sizes = pair_sizes(np.stack(lengths, axis=-1))
        if rows.row_type is MaskedPair:  # prompts of theirs are not empty
            sizes = sizes._replace(scored=rows.counts_of("chosen_mask") + rows.counts_of("rejected_mask"))
        return sizes

    def rows_with(self, ids: np.ndarray) -> dict[int, tuple[int, int]]:
        """Finds which of the token ids, int [n], occur: {id: (number of rows that hold it, index of the first)}."""
        return self._rows.rows_with(ids)

    @property
    def num_rows_of(self) -> tuple[int, ...]:
        """Rows of each data set."""
        return tuple(int(count) for count in np.bincount(self.dataset_of, minlength=len(self.names)))

    def parts(self) -> dict[str, str]:
        """Content digest of each file that the rows were read from, by where it lies."""
        return {place: digest for source in self._sources for place, digest in source.parts().items()}

    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sides of all pairs: but for a first token that nothing stands before."""
        if self._rows.row_type is MaskedPair:
            return int(self._rows.counts_of("chosen_mask").sum())
        prompt, chosen = (self._rows.lengths_of(field) for field in ("prompt_ids", "chosen_ids"))
        return int(chosen.sum() - ((prompt == 0) & (chosen > 0)).sum())

    def summary(self) -> str:
        """Lines for the user and the model card: what was read, kept, dropped and cut."""
        lines = []
        for dataset, left_out in zip(self._datasets, (source.left_out for source in self._sources), strict=True):
            lines.append(terminal(f"{without_queries(dataset.path)} ({dataset.split})"))
            if left_out:
                lines.append(f"  {figure(len(left_out), 'data file')} of no split left out: {_names(left_out)}")
        lines += [f"  {line}" for line in Tally(self.counts, self.examples).lines()]
        if self.drop_note is not None:
            lines.append(f"  {self.drop_note}")
        lines.append(f"  median {np.median(self.lengths):.0f} tokens, longest {self.lengths.max()}")
        lines += [f"  note: {warning}" for warning in self._warnings]
        return "\n".join(lines)

    @property
    def drop_note(self) -> str | None:
        """A sentence on the share of rows that were dropped; None up to `DROPPED_UNSAID` of them."""
        dropped = {name: count for name, count in self.counts.items() if name.startswith(DROPPED)}
        total, read = sum(dropped.values()), self.counts[READ]
        if total <= DROPPED_UNSAID * read:
            return None
        most = max(dropped, key=dropped.__getitem__)
        return (
            f"{total:,} of {figure(read, 'row')} ({total / read:.0%}) were dropped, "
            f"most often as {most.removeprefix(DROPPED)} ({dropped[most]:,})"
        )

    @property
    def cache_note(self) -> str:
        """Where on this machine the tokenized rows are, and whether they were there before."""
        return f"{'found tokenized in' if self.from_cache else 'tokenized into'} {terminal(self._rows.path)}"


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
      datasets: where the rows come from, one after the other.
      tokenizer: see `load_tokenizer`.
      max_length: most tokens of prompt and completion.
      max_prompt_length: most tokens of the prompt, or None.
      loss_on: the final assistant turn of each side is learnt, or every one after the turns that the sides share. Then
        the rows are a `MaskedPair` each.
      part: the rows to keep, by hash of the prompt; None: all.
      num_proc: processes that tokenize; None: one for the first `ALONE_ROWS` rows, then as many as there are cores.
        The rows are the same whatever their number.
      cache_dir: where tokenized rows are kept; None: `$XDG_CACHE_HOME/jdpo`, else ~/.cache/jdpo.
      progress: called now and then with the number of rows read so far, and of all; see `Progress`.

    Raises:
      ValueError: rows cannot be read, or none is left to train on, or every one has the same fault that ruins a model;
        it says where and why.
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
      loss_on: the final assistant turn is learnt, or every one. The other arguments: as in `prepare_pairs`.

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
        raise ValueError("no data sets were given")
    labels_of(datasets)  # a fault of theirs is said before the work
    sources = [open_source(dataset) for dataset in datasets]
    folder = cache_folder(cache_dir) / "tokenized"
    key = _key(sources, tokenizer, recipe)
    rows = store.open_store(folder, key, recipe.row_type)
    from_cache = rows is not None
    if rows is None:
        with store.creating(folder, key, recipe.row_type) as writer:
            known = [source.known_rows() for source in sources] if progress is not None else []
            total = None if None in known else sum(filter(None, known))
            tally, of_sets = Tally(), [Tally() for _ in sources]
            with contextlib.closing(_chunks(sources, tokenizer, recipe, num_proc)) as chunks:
                for chunk in chunks:
                    writer.append(chunk.block)
                    tally.take(chunk)
                    of_sets[chunk.dataset].take(chunk)
                    if progress is not None:
                        progress(tally.counts[READ], total)
            _check_kept(tally, datasets, recipe.part)
            writer.about = tally.as_dict() | {"data_sets": [one.as_dict() for one in of_sets]}
        rows = store.open_store(folder, key, recipe.row_type)
        if rows is None:
            raise ValueError(f"the tokenized rows written to {folder} read back damaged; is the disk in order?")
    return PreparedData(rows, datasets, sources, tokenizer, from_cache=from_cache)


def _chunks(sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe, num_proc: int | None) -> Generator[Chunk]:
    """Tokenizes all rows, in their order."""
    raw = _raw_chunks(sources, recipe)
    if num_proc is None:
        yield from map_in_order(
            make_chunk, (recipe, tokenizer), itertools.islice(raw, ALONE_ROWS // CHUNK_ROWS), num_proc=1
        )
        ahead = list(itertools.islice(raw, 1))
        if not ahead:
            return
        raw, num_proc = itertools.chain(ahead, raw), available_cores()
    yield from map_in_order(make_chunk, (recipe, tokenizer), raw, num_proc=num_proc)


def _raw_chunks(sources: Sequence[Source], recipe: Recipe) -> Iterator[RawChunk]:
    for number, source in enumerate(sources):
        rows = iter(source.rows())
        samples = list(itertools.islice(rows, SAMPLE_ROWS))
        if samples:
            supervised = recipe.kind == "completions"
            formats.check_rows(samples, recipe.readings[number], supervised=supervised)
        chunk, size = [], 0
        for row in itertools.chain(samples, rows):
            chunk.append(row)
            size += text_size(row[0])
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_TEXT:
                yield RawChunk(number, chunk)
                chunk, size = [], 0
        if chunk:
            yield RawChunk(number, chunk)


def _check_kept(tally: Tally, datasets: Sequence[DatasetConfig], part: Part | None) -> None:
    """
    Raises:
      ValueError: no row is left, or every one has a fault that ruins a model.
    """
    if not tally.counts[KEPT]:
        lines = [f"no rows left of {', '.join(terminal(dataset.path) for dataset in datasets)}", *tally.lines()]
        if part is not None:
            lines.append(f"eval_fraction {part.fraction} leaves none on this side; choose another, or leave it out")
        raise ValueError("\n".join(lines))
    token_checks.refuse_ruined(tally.counts, tally.counts[KEPT], tally.examples)


def _names(names: Sequence[str]) -> str:
    """The first of many names.

    >>> _names("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")


def _key(sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe) -> str:
    parts = {
        "version": CACHE_VERSION,
        "rows": [source.digest() for source in sources],
        "tokenizer": tokenizer.digest,
        "libraries": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "recipe": dataclasses.asdict(recipe),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def cache_folder(cache_dir: str | Path | None) -> Path:
    """What `cache_dir` of a config means; None: `$XDG_CACHE_HOME/jdpo`, else ~/.cache/jdpo."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdpo"
