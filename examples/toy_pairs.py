"""Random pairs for the examples: as rows of token ids, and as a batch padded on the right."""

from typing import Any

import jax
import numpy as np

from jdpo import PreferenceBatch

VOCAB, WIDTH, LENGTH = 32, 16, 12


def toy_rows(num_pairs: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Makes prompts of 3 tokens and completions of 2 to 9."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCAB, rng.integers(least, most + 1))]

    return [{"prompt_ids": ids(3, 3), "chosen_ids": ids(2, 9), "rejected_ids": ids(2, 9)} for _ in range(num_pairs)]


def padded(rows: list[dict[str, Any]]) -> PreferenceBatch:
    """Pads rows on the right: tokens and masks [rows, 2, LENGTH]."""
    shape = (len(rows), 2, LENGTH)
    tokens, attention, completion = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            ids, start = row["prompt_ids"] + row[name], len(row["prompt_ids"])
            tokens[index, side, : len(ids)], attention[index, side, : len(ids)] = ids, True
            completion[index, side, start : len(ids)] = True
    return PreferenceBatch(tokens, attention, completion)


def toy_pairs(num_pairs: int = 8, seed: int = 0) -> PreferenceBatch:
    """Makes `toy_rows`, padded."""
    return padded(toy_rows(num_pairs, seed))


def difference(one: Any, other: Any) -> float:
    """Returns the largest absolute difference between two trees of arrays, wherever their devices are."""
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(one), jax.device_get(other))
    return float(max(jax.tree.leaves(apart)))
