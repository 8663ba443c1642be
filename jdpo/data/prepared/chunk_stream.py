"""The chunks of some sources, tokenized in their order; or every n-th of them, if n processes share the work."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from jdpo.data.prepared.chunks import Chunk, RawChunk, Recipe, make_chunk
from jdpo.data.prepared.workers import available_cores, map_in_order
from jdpo.data.schemas import formats
from jdpo.data.sources import Source
from jdpo.data.sources.json_values import text_size
from jdpo.data.tokens.tokenizer import Tokenizer

CHUNK_ROWS = 512
"""A process tokenizes at most this many raw rows at a time."""

CHUNK_TEXT = 4 * 2**20
"""A chunk ends once it has this many characters, since several chunks per process are in memory."""

ALONE_ROWS = 8192
"""Rows that the first process tokenizes alone if `num_proc` is None, because starting others takes seconds."""

SAMPLE_ROWS = 3
"""Rows of each dataset that are recognised before any are tokenized, so that a wrong schema is an early error."""


class Share(NamedTuple):
    """A part of the chunks, for one of several processes: those whose number modulo `num_shares` is `rank`."""

    rank: int = 0
    num_shares: int = 1


class ChunkStream:
    """Reads all rows of some sources, and tokenizes a share of them.

    Attributes:
      num_chunks: chunks of all shares that have been read.
    """

    def __init__(
        self, sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe, num_proc: int | None, share: Share
    ) -> None:
        self.num_chunks = 0
        self._sources, self._tokenizer, self._recipe = sources, tokenizer, recipe
        self._num_proc, self._share = num_proc, share
        self._ends = [0]  # rows of all shares up to each chunk of this one

    def chunks(self) -> Generator[tuple[Chunk, int]]:
        """Yields the tokenized chunks of the share, and how many rows of all shares come up to each."""
        for number, chunk in enumerate(self._tokenized(), 1):
            yield chunk, self._ends[number]

    def _tokenized(self) -> Iterator[Chunk]:
        raw, num_proc, state = self._shared(), self._num_proc, (self._recipe, self._tokenizer)
        if num_proc is None:
            yield from map_in_order(make_chunk, state, itertools.islice(raw, ALONE_ROWS // CHUNK_ROWS), num_proc=1)
            ahead = list(itertools.islice(raw, 1))  # start further processes only if rows are left
            if not ahead:
                return
            raw, num_proc = itertools.chain(ahead, raw), available_cores()
        yield from map_in_order(make_chunk, state, raw, num_proc=num_proc)

    def _shared(self) -> Iterator[RawChunk]:
        num_rows = 0
        # Every process reads everything, as only the rows tell where chunks end. Tokenizing takes most of the time.
        for raw in _raw_chunks(self._sources, self._recipe):
            num_rows += len(raw.rows)
            self.num_chunks += 1
            if (self.num_chunks - 1) % self._share.num_shares == self._share.rank:
                self._ends.append(num_rows)
                yield raw


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
