"""From data sets to tokenized rows: read, recognise, tokenize, count; once, then from the cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from jdpo.config import DatasetConfig
from jdpo.data import formats, store, tokenize
from jdpo.data.formats import Dropped
from jdpo.data.packing_plan import ItemSizes, completion_sizes, pair_sizes
from jdpo.data.sources import Source, open_source
from jdpo.data.tokenizer import Tokenizer
from jdpo.types import CompletionRow, TokenizedCompletion, TokenizedPair

R = TypeVar("R", bound=TokenizedPair | TokenizedCompletion)

CACHE_VERSION = 2
"""To be raised whenever the same rows would be tokenized to something else, or counted otherwise."""

MOST_NAMES = 5
"""Files named in the summary at most."""

CHUNK_ROWS = 512
"""Rows tokenized in one call."""

READ, KEPT, DROPPED = "rows read", "rows kept", "dropped: "
CHOSEN_LEARNT = "preference rows of which the chosen side is learnt"

Progress = Callable[[int], None]
"""Told how many rows of all data sets of the call were read so far, dropped ones included.

It is called after every `CHUNK_ROWS` rows and after the last ones, and not at all where the rows come from the cache.
How many rows there will be is not known before.
"""


class PreparedData(Generic[R]):
    """Tokenized rows by index, memory-mapped, with what was counted on the way.

    Attributes:
      lengths: int32 [rows], tokens of the longest sequence of each row.
      counts: in plain words: rows read, rows kept, dropped by reason, truncated, ...
      digest: content digest of the tokenized rows.
      from_cache: whether an earlier run had tokenized them.
    """

    def __init__(
        self,
        rows: store.RowStore[R],
        datasets: Sequence[DatasetConfig],
        left_out: Sequence[Sequence[str]],
        *,
        from_cache: bool,
    ) -> None:
        self._rows = rows
        self._datasets = tuple(datasets)
        self._left_out = tuple(left_out)  # of each data set
        self.from_cache = from_cache
        self.lengths: np.ndarray = rows.lengths
        self.counts: dict[str, int] = rows.about["counts"]
        self.digest = rows.digest

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> R:
        row: R = self._rows[index]
        return row

    def sizes(self) -> ItemSizes:
        """How much room every row takes when packed; reads lengths only."""
        if self._rows.row_type is TokenizedPair:
            parts = [self._rows.lengths_of(field) for field in ("prompt_ids", "chosen_ids", "rejected_ids")]
            return pair_sizes(np.stack(parts, axis=-1))
        return completion_sizes(self._rows.lengths_of("tokens"), self._rows.counts_of("completion_mask"))

    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sides of all pairs: but for a first token that nothing stands before."""
        prompt, chosen = (self._rows.lengths_of(field) for field in ("prompt_ids", "chosen_ids"))
        return int(chosen.sum() - ((prompt == 0) & (chosen > 0)).sum())

    def summary(self) -> str:
        """Lines for the user and the model card: what was read, kept, dropped and cut."""
        lines = []
        for dataset, left_out in zip(self._datasets, self._left_out, strict=True):
            lines.append(f"{dataset.path} ({dataset.split})")
            if left_out:
                lines.append(f"  {len(left_out):,} data files of no split are left out: {_names(left_out)}")
        lines += [f"  {line}" for line in _Tally(self.counts, self._rows.about["examples"]).lines()]
        lines.append(f"  median {np.median(self.lengths):.0f} tokens, longest {self.lengths.max()}")
        return "\n".join(lines)

    @property
    def cache_note(self) -> str:
        """Where on this machine the tokenized rows are, and whether they were there before."""
        return f"{'found tokenized in' if self.from_cache else 'tokenized into'} {self._rows.path}"


def prepare_pairs(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedData[TokenizedPair]:
    """Reads and tokenizes preference rows, or takes them from the cache.

    Args:
      datasets: where the rows come from, one after the other.
      tokenizer: see `load_tokenizer`.
      max_length: most tokens of prompt and completion.
      max_prompt_length: most tokens of the prompt, or None.
      cache_dir: where tokenized rows are kept; None: `$XDG_CACHE_HOME/jdpo`, else ~/.cache/jdpo.
      progress: called now and then with the number of rows read so far; see `Progress`.

    Raises:
      ValueError: rows cannot be read, or none is left to train on; it says where and why.
    """
    options: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    recipe = _Recipe(
        options,
        lambda raw, origin, counts: formats.preference_row(raw, origin),
        lambda rows: tokenize.tokenize_pairs(rows, tokenizer, **options),
    )
    return _prepare(datasets, TokenizedPair, tokenizer, recipe, cache_dir=cache_dir, progress=progress)


def prepare_completions(
    datasets: Sequence[DatasetConfig],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    loss_on: tokenize.LossOn = "completion",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PreparedData[TokenizedCompletion]:
    """Reads and tokenizes supervised rows, or takes them from the cache.

    Args:
      loss_on: the final assistant turn is learnt, or every one. The other arguments: as in `prepare_pairs`.

    Raises:
      ValueError: as in `prepare_pairs`.
    """
    options: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "loss_on": loss_on,
    }

    def read(raw: dict[str, Any], origin: str, counts: Counter[str]) -> CompletionRow | Dropped:
        counts[CHOSEN_LEARNT] += formats.is_preference(raw)
        return formats.completion_row(raw, origin)

    recipe = _Recipe(options, read, lambda rows: tokenize.tokenize_completions(rows, tokenizer, **options))
    return _prepare(datasets, TokenizedCompletion, tokenizer, recipe, cache_dir=cache_dir, progress=progress)


class _Recipe(NamedTuple):
    """How one kind of row is made; `options` is all that `encode` depends on beside rows and tokenizer."""

    options: dict[str, Any]
    read: Callable[[dict[str, Any], str, Counter[str]], Any]
    encode: Callable[[list[Any]], Sequence[Any]]


def _prepare(
    datasets: Sequence[DatasetConfig],
    row_type: type[R],
    tokenizer: Tokenizer,
    recipe: _Recipe,
    *,
    cache_dir: Path | None,
    progress: Progress | None,
) -> PreparedData[R]:
    if not datasets:
        raise ValueError("no data sets were given")
    sources = [open_source(dataset) for dataset in datasets]
    folder = cache_folder(cache_dir) / "tokenized"
    key = _key(sources, row_type, tokenizer, recipe.options)
    rows = store.open_store(folder, key, row_type)
    from_cache = rows is not None
    if rows is None:
        tally = _Tally()
        with store.creating(folder, key, row_type) as writer:
            for row in _tokenized(sources, recipe, tally, progress):
                writer.append(row)
            if not tally.counts[KEPT]:
                raise ValueError(
                    f"no rows left of {', '.join(dataset.path for dataset in datasets)}\n" + "\n".join(tally.lines())
                )
            writer.about = tally.as_dict()
        rows = store.open_store(folder, key, row_type)
        if rows is None:
            raise ValueError(f"the tokenized rows written to {folder} read back damaged; is the disk in order?")
    return PreparedData(rows, datasets, [source.left_out for source in sources], from_cache=from_cache)


def _tokenized(sources: Sequence[Source], recipe: _Recipe, tally: _Tally, progress: Progress | None) -> Iterator[Any]:
    """Yields the rows that are kept, and counts all."""
    raw_rows = itertools.chain.from_iterable(source.rows() for source in sources)
    while chunk := list(itertools.islice(raw_rows, CHUNK_ROWS)):
        tally.counts[READ] += len(chunk)
        rows = [recipe.read(raw, origin, tally.counts) for raw, origin in chunk]
        results = iter(recipe.encode([row for row in rows if not isinstance(row, Dropped)]))
        for row in rows:
            result = row if isinstance(row, Dropped) else next(results)
            tally.add(result)
            if not isinstance(result, Dropped):
                yield result.row
        if progress is not None:
            progress(tally.counts[READ])


class _Tally:
    """What was counted, and the first row of each reason for dropping."""

    def __init__(self, counts: dict[str, int] | None = None, examples: dict[str, str] | None = None) -> None:
        self.counts = Counter(counts or {READ: 0, KEPT: 0})
        self.examples = dict(examples or {})

    def add(self, result: Any) -> None:
        if isinstance(result, Dropped):
            self.counts[DROPPED + result.reason] += 1
            detail = f": {result.detail}" if result.detail else ""
            self.examples.setdefault(DROPPED + result.reason, result.origin + detail)
        else:
            self.counts[KEPT] += 1
            self.counts.update(result.notes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "counts": {name: count for name, count in self.counts.items() if count},
            "examples": self.examples,
        }

    def lines(self) -> list[str]:
        counts = {name: count for name, count in sorted(self.counts.items()) if count and name not in (READ, KEPT)}
        return [f"{self.counts[READ]:,} rows read, {self.counts[KEPT]:,} kept"] + [
            f"  {count:,} {name}" + (f" (the first: {self.examples[name]})" if name in self.examples else "")
            for name, count in counts.items()
        ]


def _names(names: Sequence[str]) -> str:
    """The first of many names.

    >>> _names("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")


def _key(sources: Sequence[Source], row_type: type[Any], tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    parts = {
        "version": CACHE_VERSION,
        "rows": [source.digest() for source in sources],
        "kind": row_type.__name__,
        "tokenizer": tokenizer.digest,
        "options": options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_folder(cache_dir: str | Path | None) -> Path:
    """What `cache_dir` of a config means; None: `$XDG_CACHE_HOME/jdpo`, else ~/.cache/jdpo."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdpo"
