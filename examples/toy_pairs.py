"""A batch of random pairs, padded on the right, for the examples."""

import numpy as np

from jdpo import PreferenceBatch

VOCAB, WIDTH = 32, 16


def toy_pairs(num_pairs: int = 8, length: int = 12, seed: int = 0) -> PreferenceBatch:
    """Makes prompts of 3 tokens and completions of 2 to 9: tokens and masks [num_pairs, 2, length]."""
    rng = np.random.default_rng(seed)
    stops = 3 + rng.integers(2, length - 2, (num_pairs, 2, 1))
    positions = np.arange(length)
    return PreferenceBatch(
        tokens=rng.integers(0, VOCAB, (num_pairs, 2, length)).astype(np.int32),
        attention_mask=positions < stops,
        completion_mask=(positions >= 3) & (positions < stops),
    )
