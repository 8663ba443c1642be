"""Shares of rows with their 95 % interval, and tests of whether a share differs from one half."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

EXACT_UP_TO = 1000
"""The sign test sums binomial coefficients up to this many trials and uses the normal approximation beyond."""

Z95 = 1.959964
"""The 97.5 % quantile of the standard normal distribution."""


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Tests whether the chosen side is longer more often than by chance.

    Args:
      chosen, rejected: int [pairs], lengths of the two sides; at least one pair.

    Returns:
      counts and means; share_longer, among the pairs that differ in length, with its 95 % interval (low, high) and
      p_value, all None if no pair differs; and the accuracies, over all pairs, of always preferring the longer or the
      shorter answer, where a tie counts as wrong, as in rewards/accuracies.

    >>> found = length_bias(np.array([9, 9, 9, 9, 1, 5]), np.array([2, 2, 2, 2, 2, 5]))
    >>> found["longer"], found["equal"], found["share_longer"], round(found["p_value"], 3)
    (4, 1, 0.8, 0.375)
    """
    difference = np.asarray(chosen, np.int64) - np.asarray(rejected, np.int64)
    pairs, longer, shorter = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    decided = longer + shorter
    low, high = wilson(longer, decided) if decided else (None, None)
    return {
        "pairs": pairs,
        "longer": longer,
        "shorter": shorter,
        "equal": pairs - decided,
        "mean_chosen": float(np.mean(chosen)),
        "mean_rejected": float(np.mean(rejected)),
        "mean_difference": float(difference.mean()),
        "median_difference": float(np.median(difference)),
        "share_longer": longer / decided if decided else None,
        "low": low,
        "high": high,
        "p_value": sign_test(longer, decided) if decided else None,
        "longer_accuracy": longer / pairs,
        "shorter_accuracy": shorter / pairs,
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927).

    >>> [round(bound, 4) for bound in wilson(50, 100)]
    [0.4038, 0.5962]
    """
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # Rounding would put the ends at 1e-17 instead of 0, or above 1.
    return centre - half if successes else 0.0, centre + half if successes < trials else 1.0


def sign_test(successes: int, trials: int) -> float:
    """Returns the probability that fair coins fall at least this far from one half, on either side.

    >>> sign_test(5, 5), sign_test(3, 6)
    (0.0625, 1.0)
    """
    far = max(successes, trials - successes)
    if trials <= EXACT_UP_TO:
        tail = sum(math.comb(trials, k) for k in range(far, trials + 1))
        return min(1.0, 2 * tail / 2**trials)
    # The 1 is the continuity correction of a discrete count.
    return min(1.0, math.erfc(max(2 * far - trials - 1, 0) / math.sqrt(2 * trials)))
