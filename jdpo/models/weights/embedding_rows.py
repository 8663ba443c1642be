"""Finds rows of the embedding that were never trained, and makes initial rows for tokens, from a model's files.

Everything here is computed on the host from the files, a few MiB at a time, so that the result is bitwise the same for
every mesh and every dtype of the weights in memory. This module does not import jax.

Axes: v rows of a table (the vocabulary), d model width, n rows that are initialized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jdpo.models.model_config import ModelConfig
from jdpo.models.weights.folder_names import by_model_name
from jdpo.models.weights.hf_names import layout_of
from jdpo.models.weights.safetensors_folder import DTYPES, TensorFiles, tensor_entries

R = TypeVar("R")

NOISE_SCALE = 0.02
"""Spread of initial rows around the mean row, relative to that of the trained rows, so that new tokens differ."""

UNTRAINED_SHARE = 0.01
"""A row whose norm is below this share of the median norm was never trained."""

_CHUNK_BYTES = 2**23
_NUM_THREADS = 4


MOST_NAMED = 8
"""Largest number of tokens that a message names."""


class StartedRows(NamedTuple):
    """Initial rows for some tokens, which replace those in the model's files.

    Attributes:
      ids: int64 [n], ascending.
      embedding: float64 [n, d].
      head: float64 [n, d] for an untied head, else None.
      num_trained: number of rows of the embedding whose mean they start at.
    """

    ids: np.ndarray
    embedding: np.ndarray
    head: np.ndarray | None
    num_trained: int


class UntrainedToken(NamedTuple):
    """A token of the source tokenizer whose embedding is almost zero although the training rows contain it.

    Attributes:
      id: token id.
      token: its text in the vocabulary.
      num_rows: number of rows that contain it.
      first: where the first of them comes from.
    """

    id: int
    token: str
    num_rows: int
    first: str


def row_count(num_rows: int) -> str:
    """Returns a number of rows as text.

    >>> row_count(1), row_count(1200)
    ('1 row', '1,200 rows')
    """
    return f"{num_rows:,} row{'' if num_rows == 1 else 's'}"


def row_norms(folder: Path, config: ModelConfig) -> np.ndarray:
    """Returns the Euclidean norms of the rows of the embedding: float64 [v].

    Raises:
      ValueError: the files cannot be read.
    """
    with _Table(folder, config, layout_of(config).embedding.hf_name) as table:
        return _norms(table)


def untrained_rows(norms: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """Finds the tokens whose rows are zero or below `UNTRAINED_SHARE` of the median norm of those that are not zero.

    Args:
      norms: float [v].
      is_token: bool [v], True where the source tokenizer has a token.

    Returns:
      bool [v].

    >>> norms = np.array([1.0, 0.0, 2.0, 0.001, 0.0])
    >>> untrained_rows(norms, np.array([True, True, True, True, False]))
    array([False,  True, False,  True, False])
    """
    # Rows of zeros would lower the median, since they can be many.
    nonzero = norms[is_token & (norms > 0)]
    least = UNTRAINED_SHARE * np.median(nonzero) if nonzero.size else np.inf
    found: np.ndarray = is_token & ((norms == 0) | (norms < least))
    return found


def started_rows(folder: Path, config: ModelConfig, ids: np.ndarray, is_token: np.ndarray, seed: int) -> StartedRows:
    """Makes initial rows for tokens: the mean of the trained rows of each table, plus a little noise.

    Rows without a token of the source tokenizer, rows of zeros, and rows that are bitwise equal to another were never
    trained and are not part of the mean.

    Args:
      ids: int [n], the tokens, which may be beyond the last row of the tables.
      is_token: bool [v], True where the source tokenizer has a token.
      seed: seed of the noise.

    Raises:
      ValueError: the files cannot be read.
    """
    layout, ids = layout_of(config), np.unique(ids).astype(np.int64)
    rows, counts = [], []
    names = [layout.embedding.hf_name, *([] if config.tie_embeddings else [layout.head.hf_name])]
    for number, name in enumerate(names):
        with _Table(folder, config, name) as table:
            trained = is_token & _is_trained(table)
            # A model whose rows are all alike, such as a test's, has no better mean.
            trained = trained if trained.any() else is_token
            mean, spread = _mean_and_spread(table, trained)
        # Seeded per table, so that head and embedding get different noise.
        noise = np.random.default_rng((seed, number)).standard_normal((len(ids), config.d_model))
        rows.append(mean + NOISE_SCALE * spread * noise)
        counts.append(int(trained.sum()))
    return StartedRows(ids, rows[0], rows[1] if len(rows) > 1 else None, counts[0])


class _Table:
    """A table [v, d] of a model folder, read a few rows at a time by several threads."""

    def __init__(self, folder: Path, config: ModelConfig, hf_name: str) -> None:
        entries = by_model_name(tensor_entries(folder), config)
        expected = (config.vocab_size, config.d_model)
        if hf_name not in entries or entries[hf_name].shape != expected or entries[hf_name].dtype not in DTYPES:
            raise ValueError(f"{folder}: expected a tensor {hf_name} of shape {expected}, which the files do not have")
        self._files, self._name, self._width = TensorFiles(entries), hf_name, config.d_model
        self.num_rows = config.vocab_size

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def map(self, function: Callable[[slice, np.ndarray], R]) -> list[R]:
        """Returns function(rows, values [rows, d] in the file's dtype) for all parts of the table, in order."""
        dtype = self._files.dtype(self._name)
        # Whole rows, as many as fit in a chunk.
        num_rows = max(1, _CHUNK_BYTES // (self._width * dtype.itemsize))

        def of_part(start: int) -> R:
            rows = slice(start, min(start + num_rows, self.num_rows))
            run = np.empty((rows.stop - rows.start) * self._width, dtype)
            self._files.read_into(self._name, start * self._width, run)
            return function(rows, run.reshape(-1, self._width))

        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="embedding") as pool:
            return list(pool.map(of_part, range(0, self.num_rows, num_rows)))


def _norms(table: _Table) -> np.ndarray:
    def of_part(rows: slice, values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.promote_types(values.dtype, np.float32))
        return np.sqrt(np.einsum("vd,vd->v", wide, wide)).astype(np.float64)

    return np.concatenate(table.map(of_part))


def _is_trained(table: _Table) -> np.ndarray:
    """Returns bool [v]: False for rows of zeros and for rows that are bitwise equal to another."""

    def of_part(rows: slice, values: np.ndarray) -> tuple[Any, list[bytes]]:
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in values]
        return np.any(values != 0, axis=1), digests

    parts = table.map(of_part)
    # Equal rows are found by their digests, so that the table is never in memory.
    digests = np.array([digest for _, part in parts for digest in part], np.dtype("V16"))
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    is_trained: np.ndarray = np.concatenate([nonzero for nonzero, _ in parts]) & (counts[inverse.reshape(-1)] == 1)
    return is_trained


def _mean_and_spread(table: _Table, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation, float64 [d] each, of the rows where `chosen`, bool [v], is True."""

    def of_part(rows: slice, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = values[chosen[rows]].astype(np.float64)
        return wide.sum(axis=0), np.square(wide).sum(axis=0)

    parts, count = table.map(of_part), max(int(chosen.sum()), 1)
    # Summed in the order of the table, whichever thread was first, so that the result is bitwise the same.
    mean = np.sum([total for total, _ in parts], axis=0) / count
    square = np.sum([total for _, total in parts], axis=0) / count
    # Rounding can make the variance of equal rows slightly negative.
    return mean, np.sqrt(np.maximum(square - mean**2, 0))
