"""Mixtures of datasets: their labels, the rows per epoch of each, and the order of the rows.

Without weights or num_rows, an epoch is all rows of all datasets, once. With them, each dataset gives a fixed number of
rows per epoch, taken from an endless stream of passes over its rows, every pass in a new order. The next epoch
continues the stream, so every row is used, and none is repeated before all other rows of its dataset.

All functions are pure, and give the same result on every host.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jdpo.config import DatasetConfig, DataSettings, without_queries
from jdpo.safe_text import terminal
from jdpo.words import figure

_ENDING = re.compile(r"(\.(json|jsonl|ndjson|csv|tsv|parquet|arrow))?(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)


class Mixture(NamedTuple):
    """The number of rows of each dataset, and the number that an epoch takes from it.

    An epoch may take more rows than a dataset has; then some are repeated. Rows are numbered across all datasets, one
    dataset after the other.

    Attributes:
      sizes: rows of each dataset.
      takes: rows per epoch of each dataset.
    """

    sizes: tuple[int, ...]
    takes: tuple[int, ...]

    @property
    def num_examples(self) -> int:
        """The number of rows of an epoch.

        >>> Mixture(sizes=(10, 4), takes=(5, 8)).num_examples
        13
        """
        return sum(self.takes)

    def describe(self, labels: Sequence[str]) -> str:
        """Returns a sentence on what an epoch consists of.

        >>> Mixture(sizes=(1000, 400, 7), takes=(500, 1000, 7)).describe(["hh", "orca", "own"])
        'an epoch is 1,507 rows: 500 of hh (0.5 passes over 1,000), 1,000 of orca (2.5 passes over 400), all 7 of own'
        """
        parts = [
            f"all {size:,} of {terminal(label)}"
            if take == size
            else f"{take:,} of {terminal(label)} ({take / size:.3g} passes over {size:,})"
            for label, size, take in zip(labels, self.sizes, self.takes, strict=True)
        ]
        return f"an epoch is {figure(self.num_examples, 'row')}: {', '.join(parts)}"


# --- settings


def check_data_settings(data: DataSettings, *, pairs: bool) -> None:
    """Refuses data settings that contradict each other, before any row is read.

    Args:
      pairs: whether the run trains on pairs, not on completions.

    Raises:
      ValueError: settings contradict each other; the message names them and says what to do.
    """
    if not data.datasets:
        raise ValueError("datasets is empty: there are no rows to train on; name a file, a folder or a hub dataset")
    labels_of(data.datasets)
    # Labels of training and evaluation may be equal: they never occur in the same metric.
    labels_of(data.eval_datasets)
    _check_shares(data)
    if data.eval_fraction and data.eval_datasets:
        raise ValueError(
            f"eval_fraction {data.eval_fraction} and eval_datasets both choose the evaluation rows; remove one of them"
        )
    if data.eval_fraction == 1:
        raise ValueError("eval_fraction is 1, which leaves nothing to train on; expected a share such as 0.05")
    for dataset in (*data.datasets, *data.eval_datasets):
        if not pairs and dataset.ranked != "best_vs_worst":
            raise ValueError(
                f"{dataset.path}: ranked {dataset.ranked!r} applies to pairs, but `jdpo sft` learns the best answer; "
                "remove it"
            )
    if data.group_by_length and not data.shuffle:
        raise ValueError("group_by_length puts steps in a random order and needs shuffle: true")


def _check_shares(data: DataSettings) -> None:
    weighted = [dataset.path for dataset in data.datasets if dataset.weight is not None]
    counted = [dataset.path for dataset in data.datasets if dataset.num_rows is not None]
    if weighted and counted:
        raise ValueError(
            f"datasets: {weighted[0]} has weight and {counted[0]} has num_rows; use one of the two for all datasets"
        )
    without = [dataset.path for dataset in data.datasets if dataset.weight is None]
    if weighted and without:
        raise ValueError(f"datasets: {without[0]} has no weight, but others have one; give every dataset a weight")
    if data.num_examples is not None and not weighted:
        raise ValueError(
            f"num_examples {data.num_examples} applies to weighted datasets; give every dataset a weight, or set the "
            "rows per epoch of each with num_rows"
        )
    for dataset in data.eval_datasets:
        if dataset.weight is not None or dataset.num_rows is not None:
            raise ValueError(
                f"eval_datasets: {dataset.path} has weight or num_rows, but an evaluation reads every row once; to "
                "evaluate on part of it, set split to a slice such as train[:200]"
            )


def has_evaluation(data: DataSettings) -> bool:
    """Returns whether there are evaluation rows, in datasets of their own or held out by hash of the prompt."""
    return bool(data.eval_datasets) or data.eval_fraction > 0


def labels_of(datasets: Sequence[DatasetConfig]) -> tuple[str, ...]:
    """Returns the label of each dataset, which names it in metrics.

    Raises:
      ValueError: two datasets have the same label, or a label is empty or contains a /.
    """
    labels: dict[str, str] = {}
    for dataset in datasets:
        label = default_label(dataset.path) if dataset.label is None else dataset.label
        if not label.strip() or "/" in label:
            raise ValueError(
                f"the dataset {dataset.path} has the label {label!r}; expected a name without /, because it becomes "
                "part of names like rewards/margins/<label>"
            )
        if label in labels:
            raise ValueError(
                f"two datasets are called {label!r}: {labels[label]} and {dataset.path}; give one of them another label"
            )
        labels[label] = dataset.path
    return tuple(labels)


def default_label(path: str) -> str:
    """Returns the file's stem or the last part of a hub name, never the query of an address.

    >>> [default_label(path) for path in ("data/hh.jsonl.gz", "org/dpo-mix-7k", "s3://bucket/v1.5/", "pairs.v2.json")]
    ['hh', 'dpo-mix-7k', 'v1.5', 'pairs.v2']
    """
    name = without_queries(path).rstrip("/").rpartition("/")[2]
    return _ENDING.sub("", name, count=1) or name or "data"


def mixture_of(datasets: Sequence[DatasetConfig], sizes: Sequence[int], *, num_examples: int | None) -> Mixture:
    """Returns the mixture that a config asks for.

    Args:
      datasets: settings that have passed `check_data_settings`.
      sizes: rows kept of each dataset.
      num_examples: rows per epoch of weighted datasets; None: as many as one pass over the largest dataset needs (of
        several largest ones, over the one with the largest weight).

    Raises:
      ValueError: a weighted dataset has no rows, or gets none in an epoch.
    """
    # Fractions, so that shares do not depend on the rounding of floats.
    weights = [Fraction(dataset.weight) for dataset in datasets if dataset.weight is not None]
    counts = [dataset.num_rows for dataset in datasets]
    if weights:
        takes = _weighted(weights, sizes, num_examples)
    elif any(counts):
        takes = [size if count is None else count for count, size in zip(counts, sizes, strict=True)]
    else:
        return Mixture(tuple(sizes), tuple(sizes))
    for label, size, take in zip(labels_of(datasets), sizes, takes, strict=True):
        if not size:
            raise ValueError(
                f"the dataset {terminal(label)} has no rows left, so it cannot have a share of an epoch; remove it"
            )
        if not take:
            raise ValueError(
                f"the dataset {terminal(label)} gets none of the {sum(takes):,} rows of an epoch; increase its weight "
                "or num_examples"
            )
    return Mixture(tuple(sizes), tuple(takes))


def _weighted(weights: Sequence[Fraction], sizes: Sequence[int], num_examples: int | None) -> list[int]:
    if num_examples is not None:
        return apportion(weights, num_examples)
    # Ties go to the larger weight, which needs fewer rows of the others, then to the first.
    largest = max(range(len(sizes)), key=lambda index: (sizes[index], weights[index], -index))
    rest = [weight for index, weight in enumerate(weights) if index != largest]
    # The largest dataset gives exactly its rows; the others follow by their weights.
    takes = apportion(rest, round(sizes[largest] * sum(rest) / weights[largest])) if rest else []
    takes.insert(largest, sizes[largest])
    return takes


def apportion(weights: Sequence[Fraction], total: int) -> list[int]:
    """Divides a total in proportion to weights into whole numbers that add up to it (largest remainder method).

    >>> apportion([Fraction(1), Fraction(1), Fraction(1)], 8)
    [3, 3, 2]
    """
    exact = [weight / sum(weights) * total for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])  # stable: ties in order
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


# --- the order of rows


@functools.lru_cache(maxsize=2)
def epoch_order(mixture: Mixture, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Returns the rows of an epoch in their order: int64 [num_examples]. The array is cached; do not write to it.

    >>> epoch_order(Mixture(sizes=(2, 3), takes=(3, 2)), 0, 0, False).tolist()
    [0, 1, 0, 2, 3]
    """
    order = permutation(mixture.num_examples, seed, epoch) if shuffle else np.arange(mixture.num_examples)
    if mixture.takes == mixture.sizes:
        return order  # every row once, so a permutation of the rows is all that is needed
    # The dataset of each place in the epoch. Its rows then fill its places in the order of its stream.
    set_of = np.repeat(np.arange(len(mixture.takes)), mixture.takes)[order]
    rows = np.empty(mixture.num_examples, np.int64)
    start = 0
    for index, (size, take) in enumerate(zip(*mixture, strict=True)):
        # take * epoch rows of the stream were used by earlier epochs, so no state needs to be kept.
        rows[set_of == index] = start + _stream(size, take * epoch, take * (epoch + 1), seed, index, shuffle)
        start += size
    return rows


def _stream(size: int, start: int, stop: int, seed: int, index: int, shuffle: bool) -> np.ndarray:
    """Returns elements `start` to `stop` of the endless stream of passes over the rows 0 to `size` of one dataset."""
    parts = []
    # The passes over the dataset that this part of the stream touches.
    for number in range(start // size, -(-stop // size)):
        rows = permutation(size, seed, number, 1 + index) if shuffle else np.arange(size)
        parts.append(rows[max(start - number * size, 0) : stop - number * size])
    return np.concatenate(parts)


def permutation(num_rows: int, *key: int) -> np.ndarray:
    """Returns the numbers from 0 to num_rows in an order that depends on `key` alone."""
    # numpy guarantees the raw bits of PCG64 across versions, but not the results of Generator.permutation.
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(num_rows)
    return np.argsort(bits, kind="stable")
