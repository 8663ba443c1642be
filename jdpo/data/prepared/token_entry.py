"""The entry of some datasets in the cache of tokenized rows: opened, and written by one process or by several."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import DatasetConfig
from jdpo.data.batching.mixing import labels_of
from jdpo.data.prepared import row_store, token_checks
from jdpo.data.prepared.chunk_files import read_chunks, write_chunk
from jdpo.data.prepared.chunk_stream import ChunkStream, Share
from jdpo.data.prepared.chunks import KEPT, READ, Chunk, Recipe, Tally
from jdpo.data.prepared.prepared_data import PreparedData
from jdpo.data.sources import Source, open_source
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.durable import naming
from jdpo.safe_text import terminal

CACHE_VERSION = 11
"""Must be raised whenever the same raw rows would give other tokens or other counts."""

Progress = Callable[[int, int | None], None]
"""Called with the number of rows read so far (dropped rows included) and the total number.

The total is None if the files do not state their number of rows. The function is called after every chunk, and not at
all if the rows come from the cache. An exception that it raises ends the work.
"""


class WrittenShare(NamedTuple):
    """The file of a share of the chunks, and how many chunks are in it and in all shares."""

    path: Path
    num_chunks: int
    num_chunks_of_all: int


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """The entry of some datasets in the cache, whether or not it is there.

    Attributes:
      datasets: whose rows follow one another.
      sources: the files of each dataset.
      tokenizer: see `load_tokenizer`.
      recipe: what else the tokenized rows depend on.
      num_proc: processes that tokenize; None: one for the first rows, then one per core.
      folder: of the cache of tokenized rows.
      key: name of the entry, which follows from the content of all of these.
    """

    datasets: Sequence[DatasetConfig]
    sources: Sequence[Source]
    tokenizer: Tokenizer
    recipe: Recipe
    num_proc: int | None
    folder: Path
    key: str

    @classmethod
    def find(
        cls,
        datasets: Sequence[DatasetConfig],
        tokenizer: Tokenizer,
        recipe: Recipe,
        *,
        num_proc: int | None,
        folder: Path,
    ) -> TokenEntry:
        """Finds the files of datasets, and reads them for their digests.

        Raises:
          ValueError: files are missing or cannot be read.
        """
        if not datasets:
            raise ValueError("no datasets were given")
        labels_of(datasets)  # errors in the labels come before the work
        # Opening lists files and checks paths, so that a missing file is an error before any work.
        sources = [open_source(dataset) for dataset in datasets]
        # The key needs the digest of every file, so the files are read once even if the rows are in the cache.
        return cls(datasets, sources, tokenizer, recipe, num_proc, folder, _key(sources, tokenizer, recipe))

    def open(self, *, from_cache: bool = True) -> PreparedData[Any] | None:
        """Returns the rows if they are in the cache and undamaged.

        Args:
          from_cache: False if this run has tokenized them.
        """
        rows = row_store.open_rows(self.folder, self.key, self.recipe.row_type)
        if rows is None:
            return None
        return PreparedData(rows, self.datasets, self.sources, self.tokenizer, from_cache=from_cache)

    def written(self) -> PreparedData[Any]:
        """Returns the rows that were just written.

        Raises:
          ValueError: they are not there, or damaged.
        """
        if (data := self.open(from_cache=False)) is None:
            raise ValueError(f"the tokenized rows written to {self.folder} are damaged when read again; check the disk")
        return data

    def load(self, progress: Progress | None = None) -> PreparedData[Any]:
        """Returns the rows, which this process tokenizes if they are not in the cache.

        Raises:
          ValueError: rows cannot be read, none is left to train on, or all have a fault that ruins a model.
        """
        return self.open() or self.tokenize(progress)

    def tokenize(self, progress: Progress | None = None) -> PreparedData[Any]:
        """Tokenizes all rows and stores them; errors as for `load`."""
        stream = self._stream(Share())
        # closing: an error here must end the processes that tokenize at once, not when the garbage collector runs.
        with contextlib.closing(stream.chunks()) as chunks:
            self._store((chunk for chunk, _ in chunks), progress)
        return self.written()

    # --- by several processes

    def write_share(self, path: Path, share: Share, progress: Progress | None = None) -> WrittenShare:
        """Tokenizes a share of the rows into a file, for `join`.

        Raises:
          ValueError: rows cannot be read, or the file cannot be written.
        """
        stream, total, num_chunks = self._stream(share), self._num_rows(progress), 0
        with self._writing(), naming(path), contextlib.closing(stream.chunks()) as chunks, path.open("wb") as file:
            for chunk, num_rows in chunks:
                write_chunk(file, chunk)
                num_chunks += 1
                if progress is not None:
                    progress(num_rows, total)
        return WrittenShare(path, num_chunks, stream.num_chunks)

    def join(self, shares: Sequence[WrittenShare], progress: Progress | None = None) -> PreparedData[Any]:
        """Stores the rows of all shares, as one process that tokenizes them all does, and returns them.

        Args:
          shares: in the order of their ranks.

        Raises:
          ValueError: a share is not as it was written, none of the rows is left, or all have a fault.
        """
        self._store(self._in_order(shares), progress)
        return self.written()

    def _in_order(self, shares: Sequence[WrittenShare]) -> Iterator[Chunk]:
        readers = [read_chunks(share.path, self.recipe.row_type) for share in shares]
        lengths = {share.num_chunks_of_all for share in shares}
        total = sum(share.num_chunks for share in shares)
        if lengths != {total}:
            raise ValueError(
                f"the processes of this run have found different rows in the same files: {sorted(lengths)} blocks of "
                "them; see whether files change while they are read"
            )
        for number in range(total):
            share = number % len(shares)
            try:
                yield next(readers[share])
            except StopIteration:
                raise ValueError(f"{shares[share].path} is not as it was written; check the disk") from None

    # --- parts

    def _stream(self, share: Share) -> ChunkStream:
        return ChunkStream(self.sources, self.tokenizer, self.recipe, self.num_proc, share)

    def _num_rows(self, progress: Progress | None) -> int | None:
        """Returns the number of all rows if the files state it and somebody asks."""
        known = [source.known_rows() for source in self.sources] if progress is not None else []
        return None if None in known else sum(filter(None, known))

    def _store(self, chunks: Iterable[Chunk], progress: Progress | None) -> None:
        """Writes chunks in their order to the cache, with their counts."""
        tally, of_sets, total = Tally(), [Tally() for _ in self.sources], self._num_rows(progress)
        with row_store.writing_rows(self.folder, self.key, self.recipe.row_type) as writer:
            for chunk in chunks:
                writer.append(chunk.block)
                tally.take(chunk)
                of_sets[chunk.dataset].take(chunk)
                # Called after the chunk is written, so that a progress bar never runs ahead of the work.
                if progress is not None:
                    progress(tally.counts[READ], total)
            self._check_kept(tally)
            writer.about = tally.as_dict() | {"data_sets": [one.as_dict() for one in of_sets]}  # plain: as it is

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise row_store.cannot_write(self.folder, error) from error

    def _check_kept(self, tally: Tally) -> None:
        """Checks that there are rows to train on.

        Raises:
          ValueError: no row is left, or all rows have a fault that ruins a model.
        """
        if not tally.counts[KEPT]:
            names, part = [terminal(dataset.path) for dataset in self.datasets], self.recipe.part
            lines = [f"no rows left of {', '.join(names)}", *tally.lines()]
            # Without this hint, "no rows left" would not tell that the rows are on the other side of the split.
            if part is not None:
                purpose = {"train": "train on", "eval": "evaluate on"}[part.side]
                lines.append(f"eval_fraction {part.fraction} leaves no rows to {purpose}; change or remove it")
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
