"""Statistics of tokenized rows, whose results go into the document as they are.

Lengths are in tokens. Keys are 64-bit hashes; two different texts share one with probability 2^-64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdpo.data.batching.packing_plan import ItemSizes, plan_run
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.prepared.row_store import Elements
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import TokenizedCompletion

Json = dict[str, Any]

MOST_BINS = 16
"""The largest number of bars in a histogram."""

QUANTILES = {"minimum": 0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "maximum": 1}

_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, so invertible mod 2^64

TAIL = 4
"""An answer's end token is among its last TAIL tokens: templates write a newline or a second marker after it."""


class RowFacts(NamedTuple):
    """Measures of all rows; arrays [rows], by side ("chosen" and "rejected", or "completion") if in a dict.

    Attributes:
      prompt: int64, tokens of the prompt; of a supervised row, the tokens that are not learnt.
      length: int64, tokens of the side; of a supervised row, the learnt ones.
      key: uint64, a hash of the tokens.
      cut: bool, max_length cut the side's end: the sequence is that long and no end token closes it.
    """

    prompt: np.ndarray
    length: dict[str, np.ndarray]
    key: dict[str, np.ndarray]
    cut: dict[str, np.ndarray]

    @property
    def sequence_tokens(self) -> np.ndarray:
        """Real tokens of all sequences of each row: 2P + C + R for a pair."""
        total: np.ndarray = sum(self.length.values(), self.prompt * len(self.length))
        return total


def row_facts(data: PreparedData, tokenizer: Tokenizer, *, max_length: int) -> RowFacts:
    """Measures every row; sequences were tokenized by `tokenizer` and cut at `max_length`."""
    end_ids = np.array(tokenizer.end_token_ids, np.int64)
    names = ("completion",) if isinstance(data[0], TokenizedCompletion) else ("chosen", "rejected")
    found: list[RowFacts] = []
    # Block by block: rows are memory-mapped, and all tokens together may not fit into memory.
    for block in data.blocks():
        if len(names) == 1:
            prompt, sides = _learnt_and_not(block)
        else:
            prompt = np.diff(block["prompt_ids"][0])
            sides = {name: block[f"{name}_ids"] for name in names}
        length = {name: np.diff(offsets).astype(np.int64) for name, (offsets, _) in sides.items()}
        key = {name: _keys(*side) for name, side in sides.items()}
        cut = {name: cut_sides(*sides[name], prompt + length[name] >= max_length, end_ids) for name in names}
        found.append(RowFacts(prompt.astype(np.int64), length, key, cut))
    whole = [
        {name: np.concatenate([getattr(one, field)[name] for one in found]) for name in names}
        for field in ("length", "key", "cut")
    ]
    return RowFacts(np.concatenate([one.prompt for one in found]), *whole)


def _learnt_and_not(block: Mapping[str, Elements]) -> tuple[np.ndarray, dict[str, Elements]]:
    """Returns the number of tokens of supervised rows that are not learnt, [rows], and those that are."""
    offsets, tokens = block["tokens"]
    mask = block["completion_mask"][1]
    # Before each row, how many tokens are learnt.
    learnt = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[offsets]
    return np.diff(offsets) - np.diff(learnt), {"completion": (learnt, tokens[mask])}


def _keys(offsets: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns a 64-bit hash of the tokens of each row: uint64 [rows]."""
    places = np.arange(len(tokens)) - np.repeat(offsets[:-1], np.diff(offsets))
    # The finalizer of SplitMix64, after which the sum over a row depends on every token and its place.
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX[0] + places.astype(np.uint64) * _MIX[1]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)])
    keys: np.ndarray = sums[offsets[1:]] - sums[offsets[:-1]]  # modulo 2^64
    return keys


def cut_sides(offsets: np.ndarray, tokens: np.ndarray, is_long: np.ndarray, end_ids: np.ndarray) -> np.ndarray:
    """Returns which of the long rows have no end token among their last TAIL tokens: bool [rows].

    >>> tokens = np.array([1, 9, 5, 5, 5, 5, 5, 1, 9])
    >>> cut_sides(np.array([0, 2, 7, 9]), tokens, np.array([True, True, False]), np.array([9]))
    array([False,  True, False])
    """
    cut = is_long.copy()
    long = np.flatnonzero(is_long)
    # A sequence of max_length tokens may also have ended by itself. All long rows at once: there may be a million.
    for back in range(1, TAIL + 1):
        places = offsets[long + 1] - back
        inside = places >= offsets[long]
        cut[long[inside][np.isin(tokens[places[inside]], end_ids)]] = False
    return cut


def distribution(values: np.ndarray, edges: np.ndarray | None = None) -> Json | None:
    """Returns mean, quantiles and a histogram of the finite values, or None if there are none.

    Args:
      edges: bar edges that cover all values; a value on an edge belongs to the bar that starts there. Default: those
        of `nice_edges`.

    >>> found = distribution(np.array([3, 4, 4, 9]))
    >>> found["mean"], found["median"], found["edges"][:3], found["bars"]
    (5.0, 4.0, [3.0, 4.0, 5.0], [1, 2, 0, 0, 0, 0, 1])
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    quantiles = dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))
    if edges is None:
        whole = bool((values == np.rint(values)).all())
        edges = nice_edges(quantiles["minimum"], quantiles["maximum"], whole=whole)
    bars, _ = np.histogram(values, edges)
    spread = {"values": len(values), "mean": float(values.mean()), **quantiles}
    return spread | {"edges": edges.tolist(), "bars": bars.tolist()}


def nice_edges(low: float, high: float, *, whole: bool, most: int = MOST_BINS) -> np.ndarray:
    """Returns the edges of at most `most` bars that cover `low` to `high`, at multiples of 1, 2 or 5 times 10^n.

    Args:
      whole: make bars at least 1 wide.

    >>> nice_edges(12, 68, whole=True).tolist()
    [10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 65.0, 70.0]
    """
    # Above 0 even if all values are equal.
    rough = max((high - low) / most, 1.0 if whole else abs(high) * 1e-6 or 1e-6)
    power = math.floor(math.log10(rough))
    while True:
        for factor in (1, 2, 5):
            width = factor * 10.0**power
            first, last = math.floor(low / width), math.floor(high / width) + 1  # `high` falls into the last bar
            if last - first <= most and (width >= 1 or not whole):
                return np.arange(first, last + 1) * width
        power += 1


def repeats(prompt_keys: np.ndarray, side_keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Finds the rows that repeat or contradict others by uint64 [rows] keys: of the prompt, and of one side or two.

    Returns:
      bool [rows] each. same_row: an earlier row has the same prompt and sides; same_prompt: an earlier row has the same
      prompt, but none has the same sides too; contradictions: another row has the same prompt and the sides swapped.

    >>> found = repeats(np.array([1, 1, 1]), [np.array([5, 6, 5]), np.array([6, 5, 6])])
    >>> [mask.tolist() for mask in found.values()]
    [[False, True, False], [False, False, True], [True, True, True]]
    """
    key, contradicted = _mixed(prompt_keys, side_keys), np.zeros(len(prompt_keys), bool)
    if len(side_keys) == 2:
        # With the sides swapped, a row has the key of the rows that contradict it.
        contradicted = np.isin(key, _mixed(prompt_keys, side_keys[::-1]))
    repeated = _seen_before(key)
    same_prompt = _seen_before(prompt_keys) & ~repeated
    return {"same_prompt": same_prompt, "same_row": repeated, "contradictions": contradicted}


def _mixed(prompt_keys: np.ndarray, side_keys: Sequence[np.ndarray]) -> np.ndarray:
    # A different multiplier per column, so that swapped sides give different keys.
    parts = np.stack([prompt_keys, *side_keys]).astype(np.uint64)
    mixed: np.ndarray = (parts * _MIX[: len(parts), None]).sum(0, dtype=np.uint64)  # modulo 2^64
    return mixed


def _seen_before(keys: np.ndarray) -> np.ndarray:
    seen = np.ones(len(keys), bool)
    # np.unique returns the first place of each key, which is the row that was not seen before.
    seen[np.unique(keys, return_index=True)[1]] = False
    return seen


def step_costs(
    sizes: ItemSizes,
    sequence_tokens: np.ndarray,
    steps: Sequence[np.ndarray],
    *,
    num_shards: int,
    max_tokens_per_device: int,
    micro_batch_size: int | None = None,
) -> Json:
    """Counts the token positions of steps: every sequence padded to the longest of its step, and packed.

    Args:
      sizes: of all rows.
      sequence_tokens: int [rows], real tokens of all sequences of a row, a pair's prompt twice: 2P + C + R.
      steps: the rows of each step; at least one step.
      num_shards: devices that share a step.
      max_tokens_per_device, micro_batch_size: how much a device computes at once; see `plan_run`.

    Returns:
      the counts, where shared_tokens counts each prompt once (P + C + R); the shares of positions that hold nothing
      (padded_padding, packed_padding); and how many times fewer positions packed rows take, as the product of two
      factors: fewer_by_packing * fewer_by_sharing_prompts = fewer_in_all.
    """
    packing = plan_run(
        sizes,
        steps,
        num_shards=num_shards,
        max_tokens_per_device=max_tokens_per_device,
        micro_batch_size=micro_batch_size,
        sequences_per_row=None,
    )
    padded = packed = 0
    for indices in steps:
        shape = packing.step(indices).shape
        packed += shape.num_micro * shape.num_rows * shape.num_slots
        padded += sizes.num_sides * len(indices) * int(sizes.longest[indices].max())
    rows = np.concatenate(list(steps))
    real, shared = int(sequence_tokens[rows].sum()), int(sizes.slots[rows].sum())
    return {
        "steps": len(steps),
        "rows": len(rows),
        "sequence_tokens": real,
        "shared_tokens": shared,
        "padded_positions": padded,
        "packed_slots": packed,
        "devices": num_shards,
        "tokens_per_device": None if micro_batch_size else max_tokens_per_device,
        "rows_per_device": micro_batch_size,
        "padded_padding": 1 - real / padded,
        "packed_padding": 1 - shared / packed,
        "fewer_by_packing": padded / real * (shared / packed),
        "fewer_by_sharing_prompts": real / shared,
        "fewer_in_all": padded / packed,
    }
