from __future__ import annotations

import itertools

import numpy as np

from jdpo.data.batching.balance import balanced_bins, even_out, least_slots
from jdpo.data.batching.packing_shapes import SLOT_MULTIPLE

NO_LIMIT = 10**9


def test_swaps_reach_the_bound_where_the_longest_first_do_not() -> None:
    # The longest first put 700 + 500 + 400 in one bin and 600 + 600 in the other.
    slots = np.array([700, 600, 600, 500, 400])
    bin_of, fullest = balanced_bins(slots, 2, 5, NO_LIMIT)
    assert fullest == 1500
    assert np.bincount(bin_of, weights=slots).tolist() == [1500, 1300]
    slots = np.array([300, 300, 200, 200, 200]) * 4
    bin_of, fullest = balanced_bins(slots, 2, 3, NO_LIMIT)
    assert fullest == least_slots(slots, 2) == 2400
    assert sorted(np.bincount(bin_of).tolist()) == [2, 3]


def test_no_bin_is_fuller_than_the_best_division_by_more_than_a_few_percent() -> None:
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(40):
        slots = rng.integers(100, 1000, 8)
        divisions = (
            np.bincount(bins, weights=slots, minlength=3).max() for bins in itertools.product(range(3), repeat=8)
        )
        best = min(divisions)
        fullest = balanced_bins(slots, 3, 8, NO_LIMIT)[1]
        assert best <= fullest
        excess.append(fullest / best - 1)
    assert np.mean(excess) < 0.03


def test_real_steps_come_within_a_multiple_of_the_bound() -> None:
    rng = np.random.default_rng(1)
    for num_bins, per_bin in ((8, 8), (64, 8), (16, 16)):
        slots = np.clip(rng.lognormal(5.2, 0.7, num_bins * per_bin), 20, 1100).astype(int)
        bin_of, fullest = balanced_bins(slots, num_bins, len(slots), NO_LIMIT)
        assert np.bincount(bin_of, weights=slots, minlength=num_bins).max() == fullest
        assert fullest <= least_slots(slots, num_bins) + SLOT_MULTIPLE


def test_swaps_keep_the_number_of_items_of_each_bin() -> None:
    slots = np.random.default_rng(2).integers(100, 2000, 32)
    bin_of, _ = balanced_bins(slots, 8, 4, NO_LIMIT)
    assert np.bincount(bin_of).tolist() == [4] * 8


def test_a_bin_just_above_the_limit_is_brought_below_it() -> None:
    # 0.3 % above the bound of 18,059 is close enough, unless it is above the limit.
    slots = np.array([4333, 5483, 6062, 6464, 5528, 8247])
    assert balanced_bins(slots, 2, 6, NO_LIMIT)[1] == 18_108
    assert balanced_bins(slots, 2, 6, 18_107)[1] == 18_063


def test_pairs_with_long_prompts_are_spread_over_bins() -> None:
    rng = np.random.default_rng(3)
    for num_bins, per_bin in ((2, 16), (8, 8), (32, 16)):
        prompts, rest = (rng.lognormal(5, 0.8, num_bins * per_bin).astype(int) + 1 for _ in range(2))
        slots, tokens = prompts + rest, 2 * prompts + rest
        bin_of, fullest = balanced_bins(slots, num_bins, len(slots), NO_LIMIT)
        before = np.bincount(bin_of, weights=tokens).max()
        num_items = np.bincount(bin_of)
        even_out(tokens, slots, bin_of, num_bins)
        after = np.bincount(bin_of, weights=tokens).max()
        assert after <= before
        assert after <= 1.02 * tokens.sum() / num_bins
        # No bin becomes fuller in slots, and all keep their number of items.
        assert np.bincount(bin_of, weights=slots).max() <= fullest
        np.testing.assert_array_equal(np.bincount(bin_of), num_items)


def test_bins_stay_as_they_are_where_no_swap_helps() -> None:
    bin_of = np.array([0, 1])
    even_out(np.array([20, 12]), np.array([10, 10]), bin_of, 3)
    assert bin_of.tolist() == [0, 1]
