"""Mixtures of datasets: rows per epoch, their order, and settings that are refused."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.config import DatasetConfig, DataSettings, load_config
from jdpo.data.batching.mixing import (
    Mixture,
    apportion,
    check_data_settings,
    default_label,
    epoch_order,
    labels_of,
    mixture_of,
)

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sizes = draw(SIZES)
    return Mixture(tuple(sizes), tuple(draw(st.integers(1, 3 * size)) for size in sizes))


def dataset(name: str, **options: Any) -> DatasetConfig:
    return DatasetConfig(path=f"{name}.jsonl", **options)


def stream_of(mixture: Mixture, index: int, orders: Sequence[np.ndarray]) -> list[int]:
    """Returns the rows of one dataset in the order of the epochs, numbered from 0."""
    start = sum(mixture.sizes[:index])
    rows = np.concatenate(orders)
    return (rows[(rows >= start) & (rows < start + mixture.sizes[index])] - start).tolist()


# --- how many


def test_the_parts_of_a_total_follow_the_largest_remainders() -> None:
    assert apportion([Fraction(7), Fraction(2), Fraction(1)], 12) == [9, 2, 1]  # exact: 8.4, 2.4, 1.2; a tie: the first
    assert apportion([Fraction(1)] * 3, 2) == [1, 1, 0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 10**6))
def test_parts_add_up_and_are_within_one_of_the_share(weights: list[float], total: int) -> None:
    exact = [Fraction(weight) for weight in weights]
    parts = apportion(exact, total)
    assert sum(parts) == total
    for part, weight in zip(parts, exact, strict=True):
        assert abs(part - weight / sum(exact) * total) < 1


@given(SIZES.filter(lambda sizes: len(sizes) > 1), st.data())
def test_by_default_weights_pass_over_the_largest_set_exactly_once(sizes: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.5, 2)) for _ in sizes]
    datasets = [dataset(f"d{index}", weight=weight) for index, weight in enumerate(weights)]
    sizes[0] = 100
    mixture = mixture_of(datasets, sizes, num_examples=None)
    assert mixture.takes[0] == 100
    for take, weight in zip(mixture.takes, weights, strict=True):
        assert abs(take - 100 * weight / weights[0]) < 1.5


def test_num_examples_and_num_rows_say_how_many() -> None:
    two = [dataset("a", weight=0.75), dataset("b", weight=0.25)]
    assert mixture_of(two, [1000, 10], num_examples=200).takes == (150, 50)
    assert mixture_of([dataset("a", num_rows=5), dataset("b")], [10, 7], num_examples=None).takes == (5, 7)
    assert mixture_of([dataset("a"), dataset("b")], [10, 7], num_examples=None).takes == (10, 7)
    assert mixture_of([dataset("a"), dataset("b")], [10, 0], num_examples=None).takes == (10, 0)
    # Of two largest sets the one of the larger weight is passed over once, so that nothing comes again needlessly.
    assert mixture_of([dataset("a", weight=1), dataset("b", weight=3)], [30, 30], num_examples=None).takes == (10, 30)


def test_a_dataset_without_a_row_in_an_epoch_is_refused() -> None:
    two = [dataset("a", weight=1e6), dataset("b", weight=1)]
    with pytest.raises(ValueError, match="the dataset b gets none of the 100 rows of an epoch"):
        mixture_of(two, [1000, 1000], num_examples=100)
    with pytest.raises(ValueError, match="the dataset b has no rows left"):
        mixture_of(two, [1000, 0], num_examples=100)


# --- in which order


@given(mixtures(), st.integers(0, 2**33), st.integers(0, 4), st.booleans())
def test_the_counts_of_an_epoch_do_not_depend_on_seed_and_order(
    mixture: Mixture, seed: int, epoch: int, shuffle: bool
) -> None:
    order = epoch_order(mixture, seed, epoch, shuffle)
    starts = [0, *itertools.accumulate(mixture.sizes)]
    counts, _ = np.histogram(order, bins=starts)
    assert counts.tolist() == list(mixture.takes)
    np.testing.assert_array_equal(order, epoch_order(mixture, seed, epoch, shuffle))


@given(mixtures(), st.integers(0, 2**33), st.booleans())
def test_no_row_comes_again_before_all_others_of_its_set_did(mixture: Mixture, seed: int, shuffle: bool) -> None:
    orders = [epoch_order(mixture, seed, epoch, shuffle) for epoch in range(4)]
    for index, (size, take) in enumerate(zip(*mixture, strict=True)):
        rows = stream_of(mixture, index, orders)
        assert len(rows) == 4 * take
        if mixture.takes == mixture.sizes:
            continue  # an epoch is then a single pass
        for start in range(0, len(rows), size):
            of_pass = rows[start : start + size]
            assert len(set(of_pass)) == len(of_pass), "a pass has every row once"


def test_over_the_epochs_every_row_is_seen() -> None:
    mixture = Mixture(sizes=(10, 7), takes=(3, 7))
    orders = [epoch_order(mixture, 5, epoch, True) for epoch in range(4)]
    assert set(stream_of(mixture, 0, orders)) == set(range(10))
    assert max(Counter(stream_of(mixture, 0, orders)).values()) == 2


def test_each_pass_and_each_dataset_has_its_own_order() -> None:
    mixture = Mixture(sizes=(40, 40), takes=(80, 40))
    order = [epoch_order(mixture, 5, 0, True)]
    first, second = stream_of(mixture, 0, order), stream_of(mixture, 1, order)
    assert len({tuple(first[:40]), tuple(first[40:]), tuple(second), tuple(range(40))}) == 4


def test_the_order_of_a_mixture_never_changes() -> None:
    # Golden: a change here breaks the resuming of every run begun before it.
    mixture = Mixture(sizes=(4, 3), takes=(6, 2))
    assert epoch_order(mixture, 42, 0, True).tolist() == [2, 0, 1, 6, 3, 5, 3, 1]
    assert epoch_order(mixture, 42, 1, True).tolist() == [0, 2, 0, 1, 4, 2, 3, 4]
    assert epoch_order(mixture, 42, 1, False).tolist() == [2, 3, 0, 1, 2, 3, 6, 4]


def test_an_epoch_is_put_in_words() -> None:
    words = Mixture(sizes=(10, 4), takes=(5, 4)).describe(["hh", "own"])
    assert words == "an epoch is 9 rows: 5 of hh (0.5 passes over 10), all 4 of own"


# --- names


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/data/hh.harmless.jsonl.gz", "hh.harmless"),
        ("pairs.PARQUET", "pairs"),
        ("argilla/dpo-mix-7k", "dpo-mix-7k"),
        ("gs://bucket/folder/v1.5/", "v1.5"),
        ("/", "data"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_a_dataset_is_named_after_its_file_or_hub_name(path: str, label: str) -> None:
    assert default_label(path) == label
    assert labels_of([DatasetConfig(path=path)]) == (label,)


def test_labels_must_differ_and_fit_into_a_metric() -> None:
    with pytest.raises(ValueError, match=r"two datasets are called 'a': x/a.jsonl and y/a.json; give one"):
        labels_of([DatasetConfig(path="x/a.jsonl"), DatasetConfig(path="y/a.json")])
    assert labels_of([DatasetConfig(path="x/a.jsonl"), DatasetConfig(path="y/a.json", label="b")]) == ("a", "b")
    with pytest.raises(ValueError, match=r"the dataset a\.jsonl has the label"):
        labels_of([dataset("a", label="x/y")])
    for label in ("", " "):
        with pytest.raises(ValueError, match="it is empty"):
            dataset("a", label=label)


# --- settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["datasets=[{path: a, weight: 1}, {path: b, num_rows: 2}]"], "a has weight and b has num_rows; use one"),
        (["datasets=[{path: a, weight: 1}, b]"], "b has no weight, but others have"),
        (["datasets=[a, b]", "num_examples=5"], "num_examples 5 applies to weighted datasets"),
        (["eval_datasets=[{path: a, weight: 1}]"], "eval_datasets: a has weight or num_rows"),
        (["eval_datasets=[{path: a, num_rows: 1}]"], "such as train"),
        (
            ["eval_datasets=b", "eval_fraction=0.1"],
            "eval_fraction 0.1 and eval_datasets both choose the evaluation rows",
        ),
        (["eval_fraction=1"], "leaves nothing to train on"),
        (["group_by_length=true", "shuffle=false"], "needs shuffle: true"),
        (["datasets=[{path: x/a}, {path: y/a}]"], "two datasets are called 'a'"),
        (["eval_datasets=[{path: x/a}, {path: y/a}]"], "two datasets are called 'a'"),
    ],
)
def test_incompatible_settings_are_refused(words: list[str], message: str) -> None:
    config = load_config(DataSettings, None, ["datasets=rows.jsonl", *words])
    with pytest.raises(ValueError, match=message):
        check_data_settings(config, pairs=True)


def test_compatible_settings_are_accepted() -> None:
    weighted = [{"path": "a", "weight": 1}, {"path": "b", "weight": 0.2}]
    check_data_settings(DataSettings(datasets=weighted, num_examples=5, eval_fraction=0.1), pairs=True)
