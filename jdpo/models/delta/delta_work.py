"""Counts what a DeltaNet multiplies and keeps, for estimates; a product is one multiplication with its addition."""

from __future__ import annotations

import math
from typing import NamedTuple

from jdpo.models.delta.delta_rule import CHUNK
from jdpo.models.model_config import DeltaConfig


class RuleProducts(NamedTuple):
    """Multiplications of the delta rule per token, over all heads of a layer.

    Attributes:
      needed: those of the plain recurrence: to predict a value, to write the correction, and to read the state.
      forward: those of a place in chunks.
      backward: those of its gradients, and of what the loop over chunks computes again for them.
    """

    needed: int
    forward: int
    backward: int


def projection_width(config: DeltaConfig) -> int:
    """Returns the outputs of all projections of the layer's input: query, key, value and gate, beta and decay."""
    of_keys, of_values = 2 * config.key_head_dim, 2 * (config.value_head_dim + 1)
    return config.num_key_heads * of_keys + config.num_value_heads * of_values


def value_width(config: DeltaConfig) -> int:
    """Returns the inputs of the output projection."""
    return config.num_value_heads * config.value_head_dim


def rule_products(config: DeltaConfig, length: int) -> RuleProducts:
    """Returns the multiplications of `gated_delta_rule` for rows of this many places.

    >>> config = DeltaConfig(num_key_heads=1, num_value_heads=1, key_head_dim=8, value_head_dim=8, conv_width=4)
    >>> rule_products(config, length=4)
    RuleProducts(needed=192, forward=384, backward=864)
    """
    c, k, v = min(CHUNK, length), config.key_head_dim, config.value_head_dim
    # Two products of [c, c] for each size of blocks, except that of single elements.
    inverse = 2 * max(0, math.ceil(math.log2(c)) - 1) * c * c
    of_keys = 2 * c * k  # keys and queries with keys
    of_values = c * v + c * k + c * v + 3 * k * v  # what is written, less what is predicted; scores; and the state
    again = 2 * k * v  # the prediction, and the state as it is read
    # The inverse has a derivative of two products of its own.
    backward = config.num_key_heads * 2 * of_keys + config.num_value_heads * (2 * of_values + 2 * c * c + again)
    return RuleProducts(
        needed=config.num_value_heads * 3 * k * v,
        forward=config.num_key_heads * of_keys + config.num_value_heads * (of_values + inverse),
        backward=backward,
    )


def kept_by_rule(config: DeltaConfig, itemsize: int) -> float:
    """Returns the bytes per place that convolution and rule keep for the backward pass, where nothing is dropped.

    They are a few arrays of queries, keys and values; eight numbers for each pair of tokens of a chunk (decays, scores,
    the triangular system and its inverse, and their gradients), and the state of each chunk, in float32 or wider.

    Args:
      itemsize: bytes per number of the compute dtype.
    """
    k, v, values = config.key_head_dim, config.value_head_dim, config.num_value_heads
    operands = 3 * (2 * config.num_key_heads * k + values * v) + values * (k + v + CHUNK)
    return itemsize * operands + max(4, itemsize) * values * (8 * CHUNK + k * v / CHUNK)
