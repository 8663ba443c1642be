"""Tokenized rows of a run, with the counts of what was read, dropped and truncated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from jdpo.config import DatasetConfig, without_queries
from jdpo.data.batching.mixing import labels_of
from jdpo.data.batching.packing_plan import ItemSizes, completion_sizes, pair_sizes
from jdpo.data.prepared import row_store, token_checks
from jdpo.data.prepared.chunks import DROPPED, READ, Tally
from jdpo.data.sources import Source
from jdpo.data.tokens import tokenize
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.safe_text import terminal
from jdpo.types import AnyPair, MaskedPair, TokenizedCompletion
from jdpo.words import figure, listed

R = TypeVar("R", bound=AnyPair | TokenizedCompletion)

MOST_DROPPED = 0.05
"""A larger share of dropped rows is stated at the end of a run and in the model card."""

MOST_NAMES = 5
"""The summary names at most this many files."""


class PreparedData(Generic[R]):
    """Tokenized rows by index, memory-mapped, with their counts. The datasets follow one another.

    Attributes:
      lengths: int32 [rows], tokens of the longest sequence of each row.
      names: labels of the datasets.
      dataset_of: int32 [rows], the number of each row's dataset.
      prompt_keys: uint64 [rows], a hash of the prompt's text in the file; see `held_out.prompt_key`.
      margins: float32 [rows], score of the chosen side minus that of the rejected; NaN without scores.
      counts: {name: number of rows}: rows read, rows kept, dropped by reason, truncated, ...
      examples: {name: origin of the first row}, for most counts.
      counts_of, examples_of: the same for each dataset.
      digest: content digest of the tokenized rows.
      from_cache: whether an earlier run had tokenized them.
    """

    def __init__(
        self,
        rows: row_store.StoredRows[R],
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
        of_sets = rows.about["data_sets"]  # plain: as it is
        self.counts_of: tuple[dict[str, int], ...] = tuple(one["counts"] for one in of_sets)
        self.examples_of: tuple[dict[str, str], ...] = tuple(one["examples"] for one in of_sets)
        self.digest = rows.digest
        num_cut = self.counts.get(tokenize.COMPLETION_CUT, 0)
        # Derived from the stored counts, so they are the same whether the rows come from the cache or not.
        self._warnings = token_checks.warnings_of(self.counts, len(rows), num_cut, tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> R:
        row: R = self._rows[index]
        return row

    def part_lengths(self) -> np.ndarray:
        """Returns the tokens of prompt, chosen and rejected, int64 [rows, 3], or of each row, int64 [rows, 1]."""
        supervised = self._rows.row_type is TokenizedCompletion
        fields = ("tokens",) if supervised else ("prompt_ids", "chosen_ids", "rejected_ids")
        # Lengths come from the offsets of the Arrow file: no token is read, so planning is fast for millions of rows.
        return np.stack([self._rows.lengths_of(field) for field in fields], axis=-1)

    def sizes(self) -> ItemSizes:
        """Returns the number of slots and scored tokens of every row when packed. Reads lengths only."""
        rows, lengths = self._rows, self.part_lengths()
        if rows.row_type is TokenizedCompletion:
            return completion_sizes(lengths[:, 0], rows.counts_of("completion_mask", skip=1))
        sizes = pair_sizes(lengths)
        if rows.row_type is MaskedPair:  # their prompts are not empty, so every learnt token is scored
            sizes = sizes._replace(scored=rows.counts_of("chosen_mask") + rows.counts_of("rejected_mask"))
        return sizes

    def blocks(self) -> Iterator[dict[str, row_store.Elements]]:
        """Yields the tokens of all rows, in blocks; see `StoredRows.blocks`."""
        yield from self._rows.blocks()

    def rows_with(self, ids: np.ndarray) -> dict[int, tuple[int, int]]:
        """Returns {id: (number of rows with it, index of the first)} for the token ids, int [n], that occur."""
        return self._rows.rows_with(ids)

    @property
    def num_rows_of(self) -> tuple[int, ...]:
        """The number of rows of each dataset."""
        return tuple(int(count) for count in np.bincount(self.dataset_of, minlength=len(self.names)))

    def file_digests(self) -> dict[str, str]:
        """Returns {file: content digest} for the files that the rows were read from."""
        return {place: digest for source in self._sources for place, digest in source.file_digests().items()}

    def num_chosen_tokens(self) -> int:
        """Returns the number of scored tokens of all chosen sides. The first token of a sequence is never scored."""
        if self._rows.row_type is MaskedPair:
            return int(self._rows.counts_of("chosen_mask").sum())
        prompt, chosen = (self._rows.lengths_of(field) for field in ("prompt_ids", "chosen_ids"))
        return int(chosen.sum() - ((prompt == 0) & (chosen > 0)).sum())

    def summary(self) -> str:
        """Returns the lines for the user and the model card on rows read, kept, dropped and truncated."""
        lines = []
        for dataset, source in zip(self._datasets, self._sources, strict=True):
            # "(train)" after a file of evaluation rows would look like a mistake.
            part = f" ({dataset.split})" if source.has_splits or dataset.split != "train" else ""
            lines.append(terminal(f"{without_queries(dataset.path)}{part}"))
            if left_out := source.left_out:
                lines.append(
                    f"  {figure(len(left_out), 'data file')} of no split ignored: {listed(left_out, MOST_NAMES)}"
                )
        lines += [f"  {line}" for line in Tally(self.counts, self.examples).lines()]
        if self.drop_note is not None:
            lines.append(f"  {self.drop_note}")
        lines.append(f"  median {np.median(self.lengths):.0f} tokens, longest {self.lengths.max()}")
        lines += [f"  note: {warning}" for warning in self._warnings]
        return "\n".join(lines)

    @property
    def drop_note(self) -> str | None:
        """A sentence on the share of rows that were dropped, or None if it is at most `MOST_DROPPED`."""
        dropped = {name: count for name, count in self.counts.items() if name.startswith(DROPPED)}
        total, read = sum(dropped.values()), self.counts[READ]
        if total <= MOST_DROPPED * read:
            return None
        # The most frequent reason is usually the one to fix.
        most = max(dropped, key=dropped.__getitem__)
        return (
            f"{total:,} of {figure(read, 'row')} ({total / read:.0%}) were dropped, "
            f"most often as {most.removeprefix(DROPPED)} ({dropped[most]:,})"
        )

    @property
    def cache_note(self) -> str:
        """A sentence on where the tokenized rows are on this machine, and whether this run wrote them."""
        return f"{'found tokenized in' if self.from_cache else 'tokenized into'} {terminal(self._rows.path)}"
