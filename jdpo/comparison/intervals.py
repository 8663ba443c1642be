"""Means and shares with 95 % intervals, where the rows of one prompt count as one observation.

Rows that share a prompt resemble each other, so intervals over rows would be too narrow: prompts are resampled, each
with all of its rows. `docs/compare.md` says how often the intervals hold the true value.

Axes: c prompts, f figures computed at once, b resamples.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
NUM_RESAMPLES = 4000
"""At 4,000, an interval's ends move by about 2 % of its width with the seed, which is fixed."""
SEED = 20_26
SMALLEST_SPREAD = 0.3
"""A resample whose standard error is below this share of the data's counts as having that share; a resample of a few
equal prompts would otherwise give an infinite interval."""
FEW_VALUES = 10
"""With fewer different values, resampled standard errors are too coarse to divide by."""
MOST_RESAMPLED = 2000
"""With more prompts, the bootstrap's interval is that of Student's t to about 1 % of its width, and takes long."""
_NORMAL_QUANTILE = float(stats.norm.ppf((1 + LEVEL) / 2))

Array = np.ndarray


class Estimate(NamedTuple):
    """A figure with its 95 % interval.

    Attributes:
      value: the figure.
      low, high: ends of the interval; None if there are fewer than two prompts.
    """

    value: float
    low: float | None = None
    high: float | None = None


def mean_of(
    values: Array,
    prompts: Array,
    weights: Array | None = None,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> Estimate:
    """Estimates a mean over rows by a studentized bootstrap over prompts.

    The percentile bootstrap is too narrow for 20 prompts, and intervals from Student's t for skewed values.

    Args:
      values: float [rows].
      prompts: [rows], the prompt of each row.
      weights: float [rows], for a weighted mean; such as tokens, for a mean over tokens.
      at_least, at_most: no mean is beyond, so the interval ends there; cutting it misses the truth no more often.
    """
    sums_c, weights_c = by_prompt(values, prompts, weights)
    low, high = mean_intervals(sums_c[:, None], weights_c[:, None])
    value = sums_c.sum() / weights_c.sum()
    return _estimate(value, max(low[0], at_least), min(high[0], at_most), len(sums_c))


def share_of(flags: Array, prompts: Array) -> Estimate:
    """Estimates a share of rows by Wilson's interval.

    If prompts have several rows, the number of rows is replaced by the number of independent rows that would give the
    same standard error (Dean and Pagano, 2015).

    Args:
      flags: bool or float in [0, 1] [rows], such as 0.5 for a tie.
      prompts: [rows], the prompt of each row.
    """
    sums_c, counts_c = by_prompt(np.asarray(flags, float), prompts)
    low, high = share_intervals(sums_c[:, None], counts_c[:, None])
    return _estimate(sums_c.sum() / counts_c.sum(), low[0], high[0], len(sums_c))


def change_of(before: Array, after: Array, prompts: Array) -> Estimate:
    """Estimates the change of a share between two models that were asked the same, by Bonett and Price's interval.

    Args:
      before, after: bool or float in [0, 1] [rows].
      prompts: [rows], the prompt of each row.
    """
    sums_c, counts_c = by_prompt(np.asarray(after, float) - np.asarray(before, float), prompts)
    low, high = change_intervals(sums_c[:, None], counts_c[:, None])
    return _estimate(sums_c.sum() / counts_c.sum(), low[0], high[0], len(sums_c))


def mcnemar(before: Array, after: Array) -> float:
    """Returns the p-value of McNemar's exact test: could as many rows be right before and wrong after as the reverse?

    Args:
      before, after: bool [rows], which must have different prompts.
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return 1.0 if lost + won == 0 else float(stats.binomtest(won, lost + won, 0.5).pvalue)


def by_prompt(values: Array, prompts: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Returns the sum of weighted values and of weights of each prompt, float64 [c]."""
    _, index = np.unique(prompts, return_inverse=True)
    weights = np.ones(len(index)) if weights is None else np.asarray(weights, np.float64)
    return np.bincount(index, weights * np.asarray(values, np.float64)), np.bincount(index, weights)


def _estimate(value: float, low: float, high: float, num_prompts: int) -> Estimate:
    if num_prompts < 2:  # one prompt says nothing about others
        return Estimate(float(value))
    # Rounding in a resample may leave the value, where all prompts are equal, outside by its last digit.
    return Estimate(float(value), min(float(low), float(value)), max(float(high), float(value)))


# --- intervals of many figures at once


def mean_intervals(sums_cf: Array, weights_cf: Array) -> tuple[Array, Array]:
    """Returns both ends [f] of the intervals of sum(sums) / sum(weights).

    Args:
      sums_cf, weights_cf: sums of each prompt; weights are above 0.
    """
    value_f, error_f = _mean_and_error(sums_cf, weights_cf)
    if len(sums_cf) > MOST_RESAMPLED:
        half_f = _t_quantile(len(sums_cf)) * error_f
        return value_f - half_f, value_f + half_f
    means_bf, errors_bf = _resampled(sums_cf, weights_cf, value_f)
    # A resample is compared with the data as the data is with the truth, in units of the standard error of each.
    floor_f = np.maximum(SMALLEST_SPREAD * error_f, np.finfo(float).tiny)
    quotients_bf = (means_bf - value_f) / np.maximum(errors_bf, floor_f)
    tail = (1 - LEVEL) / 2
    first_f, last_f = np.quantile(quotients_bf, (tail, 1 - tail), axis=0)
    # Resamples spread less than the data by sqrt((n - 1) / n), which is 2.5 % of the width at 20 prompts.
    num = len(sums_cf)
    wide_f = np.sqrt(num / max(num - 1, 1)) * error_f
    # A long right tail of the quotients is one of the left end of the interval: the sides change places.
    low_f, high_f = value_f - last_f * wide_f, value_f - first_f * wide_f
    few_f = _num_different(sums_cf / weights_cf) < min(FEW_VALUES, len(sums_cf))
    if few_f.any():
        # Quantiles further out than 2.5 %, which makes up for the narrowness of small samples (Hesterberg, 2015).
        tail = float(stats.norm.cdf(-_t_quantile(num) * np.sqrt(num / max(num - 1, 1))))
        ends = np.quantile(means_bf[:, few_f], (tail, 1 - tail), axis=0)
        low_f[few_f], high_f[few_f] = ends
    return low_f, high_f


def share_intervals(sums_cf: Array, counts_cf: Array) -> tuple[Array, Array]:
    """Returns both ends [f] of Wilson's intervals of shares; arguments as for `mean_intervals`."""
    share_f, error_f = _mean_and_error(sums_cf, counts_cf)
    num, variance_f = len(sums_cf), share_f * (1 - share_f)
    number_f, z = np.full(len(share_f), float(num)), _NORMAL_QUANTILE
    if not ((counts_cf == 1) & ((sums_cf == 0) | (sums_cf == 1))).all():
        # Ties, or several rows of a prompt. Where the data shows no spread, each prompt counts as one row.
        with np.errstate(divide="ignore", invalid="ignore"):
            number_f = np.where(error_f > 0, variance_f / error_f**2, number_f)
        z = _t_quantile(num)  # the spread is estimated
    centre_f = (share_f + z**2 / (2 * number_f)) / (1 + z**2 / number_f)
    half_f = z / (1 + z**2 / number_f) * np.sqrt(variance_f / number_f + z**2 / (4 * number_f**2))
    return np.maximum(centre_f - half_f, 0), np.minimum(centre_f + half_f, 1)


def change_intervals(sums_cf: Array, counts_cf: Array) -> tuple[Array, Array]:
    """Returns both ends [f] of Bonett and Price's intervals of changes of shares; arguments as for `mean_intervals`."""
    # One more prompt that all got better, and one that all got worse: without a change, the interval is not empty.
    more_2f = np.broadcast_to(counts_cf.mean(0), (2, counts_cf.shape[1]))
    sums_cf = np.concatenate([sums_cf, more_2f * [[1], [-1]]])
    value_f, error_f = _mean_and_error(sums_cf, np.concatenate([counts_cf, more_2f]))
    half_f = _NORMAL_QUANTILE * error_f
    return np.maximum(value_f - half_f, -1), np.minimum(value_f + half_f, 1)


def _t_quantile(num: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, max(num - 1, 1)))


def _mean_and_error(sums_cf: Array, weights_cf: Array) -> tuple[Array, Array]:
    """Returns the ratio of sums, and its standard error over prompts by linearization, [f]."""
    num, total_f = len(sums_cf), weights_cf.sum(0)
    value_f = sums_cf.sum(0) / total_f
    squares_f = np.square(sums_cf - value_f * weights_cf).sum(0)
    return value_f, np.sqrt(num / max(num - 1, 1) * squares_f) / total_f


def _resampled(sums_cf: Array, weights_cf: Array, centre_f: Array) -> tuple[Array, Array]:
    """Returns the ratio of sums and its standard error in each resample of the prompts, [b, f]."""
    num = len(sums_cf)
    # Around the data's value: squares of large values would otherwise cancel.
    centred_cf = sums_cf - centre_f * weights_cf
    counts_bc = _resamples(num)
    total = counts_bc @ weights_cf
    ratio = counts_bc @ centred_cf / total
    squares = (
        counts_bc @ np.square(centred_cf)
        - 2 * ratio * (counts_bc @ (centred_cf * weights_cf))
        + ratio**2 * (counts_bc @ np.square(weights_cf))
    )
    return ratio + centre_f, np.sqrt(num / max(num - 1, 1) * np.maximum(squares, 0)) / total


@functools.lru_cache(maxsize=4)
def _resamples(num: int) -> Array:
    """Returns how often each prompt occurs in each resample, float [b, c]; always the same ones."""
    # Counts turn resampling into matrix products. They are kept for all figures of a comparison.
    return np.random.default_rng(SEED).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES).astype(np.float64)


def _num_different(values_cf: Array) -> Array:
    ordered = np.sort(values_cf, axis=0)
    return 1 + (np.diff(ordered, axis=0) > 1e-9 * np.abs(ordered[1:])).sum(0)
