"""What the figures of tokenized rows say of a data set, before anything is trained: pure functions of numpy arrays.

Lengths are in tokens. Keys are 64-bit hashes: of two different texts they are the same once in 2^64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jdpo.data.batching.packing_plan import ItemSizes, plan_run

MOST_BINS = 16
"""Bars of a histogram at most."""

EXACT_UP_TO = 1000
"""Trials up to which the sign test sums binomial coefficients; a normal curve stands in for them beyond."""

Z95 = 1.959964
"""Standard deviations on either side of the mean that hold 95 % of a normal curve."""

_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, so that none is lost


class Distribution(NamedTuple):
    """How values are spread.

    Attributes:
      values, mean, minimum, p5, p25, median, p75, p95, p99, maximum: how many there are, and of all of them.
      edges: where the bars of the histogram begin, and where the last one ends.
      bars: how many values each holds; a value on an edge belongs to the bar that begins there.
    """

    values: int
    mean: float
    minimum: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    p99: float
    maximum: float
    edges: tuple[float, ...]
    bars: tuple[int, ...]


def distribution(values: np.ndarray, edges: np.ndarray | None = None) -> Distribution | None:
    """The spread of finite values; None where there are none.

    Args:
      edges: of the histogram, to hold all values; None: those of `nice_edges`.

    >>> found = distribution(np.array([3, 4, 4, 9]))
    >>> found.mean, found.median, found.edges[:3], found.bars
    (5.0, 4.0, (3.0, 4.0, 5.0), (1, 2, 0, 0, 0, 0, 1))
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    if edges is None:
        edges = nice_edges(float(values.min()), float(values.max()), whole=bool((values == np.rint(values)).all()))
    bars, _ = np.histogram(values, edges)
    low, p5, p25, median, p75, p95, p99, high = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]).tolist()
    return Distribution(
        values=len(values),
        mean=float(values.mean()),
        minimum=low,
        p5=p5,
        p25=p25,
        median=median,
        p75=p75,
        p95=p95,
        p99=p99,
        maximum=high,
        edges=tuple(edges.tolist()),
        bars=tuple(bars.tolist()),
    )


def nice_edges(low: float, high: float, *, whole: bool) -> np.ndarray:
    """Edges of at most MOST_BINS bars that hold everything from `low` to `high`: multiples of 1, 2 or 5 times 10^n.

    Args:
      whole: bars are at least 1 wide.

    >>> nice_edges(12, 68, whole=True).tolist()
    [10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 65.0, 70.0]
    """
    rough = max((high - low) / MOST_BINS, 1.0 if whole else abs(high) * 1e-6 or 1e-6)
    power = math.floor(math.log10(rough))
    while True:
        for factor in (1, 2, 5):
            width = factor * 10.0**power
            first, last = math.floor(low / width), math.floor(high / width) + 1  # `high` lies within the last bar
            if last - first <= MOST_BINS and (width >= 1 or not whole):
                return np.arange(first, last + 1) * width
        power += 1


class LengthBias(NamedTuple):
    """Whether the chosen side is longer more often than chance would have it.

    Attributes:
      pairs, longer, shorter, equal: pairs in all; those whose chosen side is longer than, shorter than, as long as the
        rejected one.
      mean_chosen, mean_rejected, mean_difference, median_difference: tokens; chosen minus rejected.
      share_longer: of the pairs that differ in length, None where none does...
      low, high: ... and its 95 % interval (Wilson).
      p_value: two-sided sign test of share_longer against one half.
      longer_accuracy, shorter_accuracy: the share of all pairs that "always prefer the longer (shorter)" gets right; a
        tie counts as wrong, as in rewards/accuracies.
    """

    pairs: int
    longer: int
    shorter: int
    equal: int
    mean_chosen: float
    mean_rejected: float
    mean_difference: float
    median_difference: float
    share_longer: float | None
    low: float | None
    high: float | None
    p_value: float | None
    longer_accuracy: float
    shorter_accuracy: float


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> LengthBias:
    """Compares lengths int [pairs] of the two sides; there is at least one pair.

    >>> found = length_bias(np.array([9, 9, 9, 9, 1, 5]), np.array([2, 2, 2, 2, 2, 5]))
    >>> found.longer, found.equal, found.share_longer, round(found.p_value, 3)
    (4, 1, 0.8, 0.375)
    """
    difference = np.asarray(chosen, np.int64) - np.asarray(rejected, np.int64)
    pairs, longer, shorter = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    decided = longer + shorter
    low, high = wilson(longer, decided) if decided else (None, None)
    return LengthBias(
        pairs=pairs,
        longer=longer,
        shorter=shorter,
        equal=pairs - decided,
        mean_chosen=float(np.mean(chosen)),
        mean_rejected=float(np.mean(rejected)),
        mean_difference=float(difference.mean()),
        median_difference=float(np.median(difference)),
        share_longer=longer / decided if decided else None,
        low=low,
        high=high,
        p_value=sign_test(longer, decided) if decided else None,
        longer_accuracy=longer / pairs,
        shorter_accuracy=shorter / pairs,
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927).

    >>> [round(bound, 4) for bound in wilson(50, 100)]
    [0.4038, 0.5962]
    """
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return centre - half if successes else 0.0, centre + half if successes < trials else 1.0


def sign_test(successes: int, trials: int) -> float:
    """How probable it is that fair coins fall at least this far from one half, on either side.

    >>> sign_test(5, 5), sign_test(3, 6)
    (0.0625, 1.0)
    """
    far = max(successes, trials - successes)
    if trials <= EXACT_UP_TO:
        tail = sum(math.comb(trials, k) for k in range(far, trials + 1))
        return min(1.0, 2 * tail / 2**trials)
    return min(1.0, math.erfc(max(2 * far - trials - 1, 0) / math.sqrt(2 * trials)))


class Repeats(NamedTuple):
    """Rows that say again, or deny, what others say; bool [rows] each.

    Attributes:
      prompt: an earlier row has the same prompt, and none of them the same sides.
      row: an earlier row has the same prompt and the same sides.
      reversed: another row has the same prompt and the same sides, the other way round.
    """

    prompt: np.ndarray
    row: np.ndarray
    reversed: np.ndarray


def repeats(prompt_keys: np.ndarray, side_keys: Sequence[np.ndarray]) -> Repeats:
    """Compares rows by their keys, uint64 [rows]: of the prompt, and of one side or two.

    >>> found = repeats(np.array([1, 1, 1]), [np.array([5, 6, 5]), np.array([6, 5, 6])])
    >>> [array.tolist() for array in found]
    [[False, True, False], [False, False, True], [True, True, True]]
    """
    key = _mixed(prompt_keys, side_keys)
    denied = np.zeros(len(key), bool)
    if len(side_keys) == 2:
        denied = np.isin(key, _mixed(prompt_keys, side_keys[::-1]))
    again = _again(key)
    return Repeats(_again(prompt_keys) & ~again, again, denied)


def _mixed(prompt_keys: np.ndarray, side_keys: Sequence[np.ndarray]) -> np.ndarray:
    parts = np.stack([prompt_keys, *side_keys]).astype(np.uint64)
    mixed: np.ndarray = (parts * _MIX[: len(parts), None]).sum(0, dtype=np.uint64)  # modulo 2^64
    return mixed


def _again(keys: np.ndarray) -> np.ndarray:
    """Whether each key stands at an earlier place too."""
    again = np.ones(len(keys), bool)
    again[np.unique(keys, return_index=True)[1]] = False
    return again


class StepCosts(NamedTuple):
    """Token positions that the steps of a run take, laid out in two ways.

    Attributes:
      steps, rows: how many were counted.
      sequence_tokens: real tokens of all sequences, a pair's prompt twice: 2P + C + R.
      shared_tokens: the same with each prompt once: P + C + R.
      padded_positions: all sequences of a step padded to its longest.
      packed_slots: jdpo's packed rows, with what they leave empty.
    """

    steps: int
    rows: int
    sequence_tokens: int
    shared_tokens: int
    padded_positions: int
    packed_slots: int

    @property
    def padded_padding(self) -> float:
        """Share of a padded trainer's positions that hold nothing."""
        return 1 - self.sequence_tokens / self.padded_positions

    @property
    def packed_padding(self) -> float:
        """Share of packed slots that hold nothing."""
        return 1 - self.shared_tokens / self.packed_slots

    @property
    def from_padding(self) -> float:
        """How many times fewer positions there are once padding is left out, packing's own included."""
        return self.padded_positions / self.sequence_tokens * (self.shared_tokens / self.packed_slots)

    @property
    def from_sharing(self) -> float:
        """How many times fewer positions there are once each prompt stands once."""
        return self.sequence_tokens / self.shared_tokens

    @property
    def speed_up(self) -> float:
        """How many times fewer positions packed rows take; the product of the other two."""
        return self.padded_positions / self.packed_slots


def step_costs(
    sizes: ItemSizes,
    sequence_tokens: np.ndarray,
    steps: Sequence[np.ndarray],
    *,
    num_shards: int,
    max_tokens_per_device: int,
    micro_batch_size: int | None = None,
) -> StepCosts:
    """Counts positions of steps, padded and packed.

    Args:
      sizes: of all rows.
      sequence_tokens: int [rows], real tokens of all sequences of a row.
      steps: the rows of each step; there is at least one.
      num_shards: devices that share a step.
      max_tokens_per_device, micro_batch_size: how much a device computes at once; see `plan_run`.
    """
    packing = plan_run(
        sizes,
        steps,
        num_shards=num_shards,
        max_tokens_per_device=max_tokens_per_device,
        micro_batch_size=micro_batch_size,
    )
    padded = packed = 0
    for indices in steps:
        shape = packing.step(indices).shape
        packed += shape.num_micro * shape.num_rows * shape.num_slots
        padded += sizes.num_sides * len(indices) * int(sizes.longest[indices].max())
    rows = np.concatenate(list(steps))
    return StepCosts(
        steps=len(steps),
        rows=len(rows),
        sequence_tokens=int(sequence_tokens[rows].sum()),
        shared_tokens=int(sizes.slots[rows].sum()),
        padded_positions=padded,
        packed_slots=packed,
    )
