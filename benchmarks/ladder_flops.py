"""The expected gain of each rung of the ladder by arithmetic: FLOPs of one step from lengths and shape, by hand.

N is the backbone's matrices, h = d V the head's; a matrix product costs 2 FLOPs per weight and token forward and 4
backward. Of a pair's tokens P, C, R (prompt, chosen, rejected) a live reference costs another 2.

    padded           8 (N + h) per place of a [2 b, longest] rectangle
    packed           8 (N + h) (2 P + C + R)
    shared prompt    8 (N + h) (P + C + R)
    chunked head     8 N (P + C + R) + 10 h (C + R)       the head on scored tokens; its backward pass recomputes
    cached reference 6 N (P + C + R) + 8 h (C + R)
    attention        the same, with only the lower triangle of each sequence

Attention over a row of t places, of one or several sequences, is two products of 2 t^2 w FLOPs per layer, w the width
of all heads; backward has four, and a fifth if the scores are recomputed.
"""

from __future__ import annotations

import numpy as np
from speed_model import ModelShape

RUNGS = ("padded", "packed", "shared prompt", "chunked head", "cached reference", "attention")


def predicted_flops(
    shape: ModelShape, lengths: np.ndarray, *, padded: int, apart: tuple[int, int], shared: tuple[int, int]
) -> dict[str, float]:
    """Returns the FLOPs of a step, by rung.

    Args:
      shape: of the model.
      lengths: int [b, 3], cut tokens of prompt, chosen and rejected.
      padded: places of a padded sequence.
      apart, shared: rows of packed attention and places of each, without and with shared prompts: plain attention
        computes them all.
    """
    n, h = float(shape.backbone), float(shape.head)
    prompt, sides = lengths[:, 0], lengths[:, 1:]
    repeated, once, scored = int((2 * prompt + sides.sum(1)).sum()), int(lengths.sum()), int(sides.sum())
    num_sequences = 2 * len(lengths)
    full_apart, full = (rows * attention_flops(shape, places) for rows, places in (apart, shared))
    real = sum(attention_flops(shape, length) for length in (prompt[:, None] + sides).reshape(-1).tolist())
    return {
        "padded": 8 * (n + h) * num_sequences * padded + 4 * num_sequences * attention_flops(shape, padded),
        "packed": 8 * (n + h) * repeated + 4 * full_apart,
        "shared prompt": 8 * (n + h) * once + 4 * full,
        "chunked head": 8 * n * once + 10 * h * scored + 4 * full,
        "cached reference": 6 * n * once + 8 * h * scored + 3 * full,
        "attention": 6 * n * once + 8 * h * scored + 3.5 * real / 2,
    }


def attention_flops(shape: ModelShape, length: int) -> float:
    """Returns the FLOPs of the forward pass over a full square of scores."""
    return 4.0 * length**2 * shape.num_heads * shape.head_dim * shape.num_layers
