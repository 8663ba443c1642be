"""Measures how often the 95 % intervals of `jdpo compare` hold the true value: python benchmarks/interval_coverage.py

Draws data whose truth is known, 1,000 times for each of three seeds and of 20 further ones. Prints a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from machine import machine_line

from jdpo.comparison import intervals

NUM_DRAWS, SEEDS, FURTHER_SEEDS = 1000, (1, 2, 3), range(100, 120)


class World(NamedTuple):
    """A kind of data, `draw(rng, prompts)` -> sums and counts [prompts, draws] and the truth, and its interval."""

    name: str
    interval: Callable[..., tuple[np.ndarray, np.ndarray]]
    draw: Callable[[Any, int], tuple[np.ndarray, np.ndarray, Any]]


def means(effects: Callable[[Any, Any], np.ndarray], truth: float, *, several: bool) -> Callable[..., Any]:
    """Means of rows; prompts differ by `effects`, and with `several` have 1 to 5 rows with noise of their own."""

    def draw(rng: Any, num_prompts: int) -> tuple[np.ndarray, np.ndarray, float]:
        shape = (num_prompts, NUM_DRAWS)
        counts = rng.integers(1, 6, shape).astype(float) if several else np.ones(shape)
        noise = rng.normal(0, 1, shape) if several else 0
        return counts * effects(rng, shape) + np.sqrt(counts) * noise, counts, truth

    return draw


def shares(*, several: bool, ties: float = 0.0) -> Callable[..., Any]:
    def draw(rng: Any, num_prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape, truth = (num_prompts, NUM_DRAWS), rng.uniform(0.2, 0.8, NUM_DRAWS)
        if several:
            counts = rng.integers(1, 6, shape)
            return rng.binomial(counts, rng.beta(3 * truth, 3 * (1 - truth), shape)).astype(float), counts, truth
        won = (rng.random(shape) < truth).astype(float)
        return np.where(rng.random(shape) < ties, 0.5, won), np.ones(shape), ties / 2 + (1 - ties) * truth

    return draw


def changes(rng: Any, num_prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    won, lost = rng.uniform(0.02, 0.3, (2, NUM_DRAWS))
    draws = rng.random((num_prompts, NUM_DRAWS))
    return np.where(draws < won, 1.0, np.where(draws < won + lost, -1.0, 0.0)), np.ones_like(draws), won - lost


def normal(rng: Any, shape: Any) -> np.ndarray:
    return rng.normal(0, 1, shape)


def skewed(rng: Any, shape: Any) -> np.ndarray:
    return rng.gamma(2, 1, shape)


def exponential(rng: Any, shape: Any) -> np.ndarray:
    return rng.exponential(1, shape)


def percentile(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plain percentile bootstrap, for comparison."""
    num = len(sums)
    resamples = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=intervals.NUM_RESAMPLES)
    low, high = np.quantile((resamples @ sums) / (resamples @ counts), (0.025, 0.975), axis=0)
    return low, high


WORLDS = (
    World("mean, normal, 1 to 5 rows per prompt", intervals.mean_intervals, means(normal, 0.0, several=True)),
    World("mean, skewed (gamma 2), 1 to 5 rows", intervals.mean_intervals, means(skewed, 2.0, several=True)),
    World("mean, exponential, one row", intervals.mean_intervals, means(exponential, 1.0, several=False)),
    World("  the same by plain percentiles", percentile, means(exponential, 1.0, several=False)),
    World("share, one row", intervals.share_intervals, shares(several=False)),
    World("share, 1 to 5 rows", intervals.share_intervals, shares(several=True)),
    World("win rate with 20 % ties", intervals.share_intervals, shares(several=False, ties=0.2)),
    World("change of a share", intervals.change_intervals, changes),
)


def coverage(world: World, num_prompts: int, seed: int) -> float:
    sums, counts, truth = world.draw(np.random.default_rng(seed), num_prompts)
    low, high = world.interval(sums, counts)
    return 100 * float(np.mean((low <= truth) & (truth <= high)))


def main() -> None:
    print(f"{machine_line(('numpy', 'scipy'))}\n")
    print("| data | prompts | seeds 1, 2, 3 | mean of 20 further seeds |")
    print("|---|---|---|---|")
    for world in WORLDS:
        for num_prompts in (20, 200):
            fixed = ", ".join(f"{coverage(world, num_prompts, seed):.1f}" for seed in SEEDS)
            further = np.mean([coverage(world, num_prompts, seed) for seed in FURTHER_SEEDS])
            print(f"| {world.name} | {num_prompts} | {fixed} | {further:.2f} |")


if __name__ == "__main__":
    main()
