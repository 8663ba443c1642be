"""Intervals hold the true value in 95 % of draws, and agree with scipy where it has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from jdpo.comparison import intervals
from jdpo.comparison.intervals import change_of, mcnemar, mean_of, share_of

NUM_DRAWS = 1000
SEEDS = (1, 2, 3)


def drawn_rows(num_prompts: int, skewed: bool, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums and counts of 1 to 5 rows per prompt, [prompts, draws], and the true mean.

    Prompts differ as much as rows of one prompt do.
    """
    rng = np.random.default_rng(seed)
    shape = (num_prompts, NUM_DRAWS)
    counts = rng.integers(1, 6, shape).astype(float)
    prompts, truth = (rng.gamma(2, 1, shape), 2.0) if skewed else (rng.normal(0, 1, shape), 0.0)
    return counts * prompts + np.sqrt(counts) * rng.normal(0, 1, shape), counts, truth


def drawn_shares(num_prompts: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums and counts of shares, and the true share of each draw."""
    rng = np.random.default_rng(seed)
    shape, truth = (num_prompts, NUM_DRAWS), rng.uniform(0.2, 0.8, NUM_DRAWS)
    if kind == "one row":
        return (rng.random(shape) < truth).astype(float), np.ones(shape), truth
    counts = rng.integers(1, 6, shape)
    of_prompts = rng.beta(3 * truth, 3 * (1 - truth), shape)
    return rng.binomial(counts, of_prompts).astype(float), counts.astype(float), truth


def coverage(ends: tuple[np.ndarray, np.ndarray], truth: Any) -> float:
    low, high = ends
    return 100 * float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("num_prompts", [20, 200])
def test_intervals_of_means_hold_the_truth(num_prompts: int, skewed: bool, seed: int) -> None:
    sums, counts, truth = drawn_rows(num_prompts, skewed, seed)
    found = coverage(intervals.mean_intervals(sums, counts), truth)
    print(f"{num_prompts} prompts, skewed {skewed}, seed {seed}: {found:.1f} %")
    assert 93.5 <= found <= 96.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["one row", "several rows"])
@pytest.mark.parametrize("num_prompts", [20, 200])
def test_intervals_of_shares_hold_the_truth(num_prompts: int, kind: str, seed: int) -> None:
    sums, counts, truth = drawn_shares(num_prompts, kind, seed)
    found = coverage(intervals.share_intervals(sums, counts), truth)
    print(f"{num_prompts} prompts, {kind}, seed {seed}: {found:.1f} %")
    assert 93.5 <= found <= 96.5


@pytest.mark.parametrize("num_prompts", [20, 200])
def test_intervals_of_changes_hold_the_truth(num_prompts: int) -> None:
    rng = np.random.default_rng(0)
    won, lost = rng.uniform(0.05, 0.4, (2, NUM_DRAWS))
    draws = rng.random((num_prompts, NUM_DRAWS))
    changes = np.where(draws < won, 1.0, np.where(draws < won + lost, -1.0, 0.0))
    # Few discordant prompts give wide intervals, never narrow ones.
    assert 93.5 <= coverage(intervals.change_intervals(changes, np.ones_like(changes)), won - lost) <= 98.5


def test_percentiles_are_too_narrow_for_20_prompts() -> None:
    sums, counts, truth = drawn_rows(20, True, 1)
    studentized = coverage(intervals.mean_intervals(sums, counts), truth)
    rng = np.random.default_rng(0)
    resamples = rng.multinomial(20, np.full(20, 1 / 20), size=2000)
    percentile = coverage(np.quantile(resamples @ sums / (resamples @ counts), (0.025, 0.975), axis=0), truth)
    assert percentile < 93 < studentized


def test_a_share_has_wilsons_interval() -> None:
    flags = np.arange(30) < 7
    expected = stats.binomtest(7, 30).proportion_ci(method="wilson")
    assert share_of(flags, np.arange(30)) == pytest.approx((7 / 30, expected.low, expected.high))


def test_rows_of_one_prompt_count_as_one() -> None:
    values, prompts = np.random.default_rng(0).normal(size=20), np.arange(20)
    once, copied = mean_of(values, prompts), mean_of(np.repeat(values, 4), np.repeat(prompts, 4))
    assert copied == pytest.approx(once)
    flags = values > 0
    assert share_of(np.repeat(flags, 4), np.repeat(prompts, 4))[1] < share_of(flags, prompts)[1] + 0.02


def test_weights_give_a_mean_over_tokens() -> None:
    found = mean_of(np.array([1.0, 3.0, 2.0]), np.array([0, 1, 1]), np.array([2.0, 1.0, 1.0]))
    assert found.value == pytest.approx((2 + 3 + 2) / 4)


def test_without_a_change_means_are_zero_and_shares_stay_open() -> None:
    assert mean_of(np.zeros(20), np.arange(20)) == (0, 0, 0)
    flags = np.arange(20) < 9
    change = change_of(flags, flags, np.arange(20))
    assert change.value == 0
    assert change.low is not None
    assert change.low < 0 < (change.high or 0)


def test_one_prompt_has_no_interval() -> None:
    assert mean_of(np.array([1.0, 2.0]), np.array([7, 7])) == (1.5, None, None)


def test_an_interval_ends_where_no_mean_can_be() -> None:
    values, prompts = np.array([0.1, 0.9]), np.arange(2)
    found, cut = mean_of(values, prompts), mean_of(values, prompts, at_least=0, at_most=1)
    assert found.low is not None
    assert found.low < 0
    assert cut == (0.5, 0, 1)


def test_a_few_equal_prompts_give_a_finite_interval() -> None:
    found = mean_of(np.array([0.0, 0.0, 1.0]), np.arange(3))
    assert found.low is not None
    assert found.high is not None
    assert -3 < found.low <= 0 < 1 <= found.high < 3


def test_many_prompts_give_the_interval_that_resampling_approaches() -> None:
    num = intervals.MOST_RESAMPLED + 1
    sums = np.random.default_rng(0).gamma(2, 1, (num, 1))
    few, many = (intervals.mean_intervals(sums[:size], np.ones((size, 1))) for size in (num - 1, num))
    width = many[1][0] - many[0][0]
    assert few[0][0] == pytest.approx(many[0][0], abs=0.04 * width)
    assert few[1][0] == pytest.approx(many[1][0], abs=0.04 * width)


def test_mcnemar_counts_discordant_rows_alone() -> None:
    before, after = np.array([True] * 5 + [False] * 5), np.array([True] * 4 + [False] + [True] * 5)
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 6) / 2**6)  # one lost, five won
    assert mcnemar(before, before) == 1
