"""The number of tokens that meet the LM head at once, by the speed and memory of the devices."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jdpo.chips import chip_of
from jdpo.losses.linear_chunks import MIN_CHUNK_TOKENS

CHUNK_TOKENS = 1024
"""Tokens of a chunk on a GPU or TPU whose speed is unknown; those that are known need 700 to 2300."""

MEMORY_PART = 1 / 32
"""Maximum part of a device's memory for the float32 logits of a chunk; the backward pass has about twice as much."""

KEPT_LOGITS = 2**26
"""Maximum logits on a CPU, 256 MiB in float32, that the backward pass reads from the forward pass."""

_UNKNOWN_MEMORY = 32 * 2.0**30


def head_chunk_tokens(device_kind: str, dtype: Any, vocabulary: int) -> int:
    """Returns the tokens of a device per chunk from which the arithmetic takes longer than the head's gradient moves.

    Each chunk reads and writes the whole gradient of the head in float32, 8 bytes per weight, and multiplies 2 FLOPs
    per weight and token for it. So a chunk of 4 x peak FLOP/s / bandwidth tokens takes as long for one as for the
    other. On CPUs caches matter more, and small chunks are faster.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: of the operands of the product.
      vocabulary: logits of a token.

    >>> [head_chunk_tokens(kind, "bfloat16", 128256) for kind in ("cpu", "NVIDIA H200", "TPU v6 lite")]
    [256, 896, 1920]
    """
    if device_kind == "cpu":
        return MIN_CHUNK_TOKENS
    chip, tokens, memory = chip_of(device_kind), CHUNK_TOKENS, _UNKNOWN_MEMORY
    if chip is not None:
        balance = 4 * (chip.peak(jnp.dtype(dtype).name) or math.nan) / chip.hbm_bandwidth
        # nan, where a figure is missing, is not above 0.
        tokens = 128 * math.ceil(balance / 128) if balance > 0 else tokens
        memory = chip.hbm_bytes if chip.hbm_bytes > 0 else memory
    # 4 bytes per logit. In multiples of 128, the width of a TPU's matrix unit.
    most = 128 * int(MEMORY_PART * memory / (4 * vocabulary) / 128)
    return max(min(tokens, most), MIN_CHUNK_TOKENS)


def max_kept_logits(device_kind: str) -> int:
    """Returns the logits of a device up to which they are made in one chunk, and kept for the backward pass.

    Multiplying again takes a CPU several times as long as reading what it has written. On a GPU or TPU the memory is
    better spent on the layers.
    """
    return KEPT_LOGITS if device_kind == "cpu" else 0
