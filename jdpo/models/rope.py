"""Rotary position embedding, in the half-split layout of most Hugging Face checkpoints or in the interleaved one.

Also the scaling of queries by their position.

Axes: n sequences, t positions, h heads, k head width.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.models.model_config import QueryScaling, RopeConfig

RopeTables = tuple[jax.Array, jax.Array]
"""Cosines and sines [n, t, 1, rotated pairs], see `rope_tables`."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Returns the radians per position of each rotated pair, float64, as in transformers' modeling_rope_utils."""
    num_dims = rope.rotated_dims(head_dim)
    frequencies = 1.0 / rope.theta ** (np.arange(0, num_dims, 2, dtype=np.float64) / num_dims)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "longrope":
        return frequencies / np.asarray(rope.divisors, np.float64)
    # Slow waves (few turns within the original length) are stretched by `factor`, fast ones kept, others blended.
    kept = _kept_by_turns(rope, frequencies) if rope.kind == "llama3" else _kept_by_place(rope, num_dims)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _kept_by_turns(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Returns the share of each frequency that Llama 3 keeps: linear in its number of turns in the original length."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)


def _kept_by_place(rope: RopeConfig, num_dims: int) -> np.ndarray:
    """Returns the share of each frequency that YaRN (arXiv 2309.00071) keeps: linear in the index of the pair."""

    def pair_that_makes(turns: float) -> float:
        return num_dims * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_makes(rope.beta_fast), pair_that_makes(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # num_dims - 1 is not the last pair, but it is the limit that transformers uses.
    low, high = max(low, 0), min(high, num_dims - 1)
    # Equal ends would divide by zero; transformers widens the ramp by the same number.
    width = high - low or 0.001
    return 1 - np.clip((np.arange(num_dims // 2) - low) / width, 0.0, 1.0)


def rope_tables(positions_nt: jax.Array, rope: RopeConfig, head_dim: int, dtype: Any) -> RopeTables:
    """Returns cosines and sines [n, t, 1, rotated pairs] of each position, which broadcast over heads."""
    # [pairs], rounded once from float64
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim), dtype)
    # [n, t, 1, pairs]; the 1 is the axis of heads
    angles = positions_nt[:, :, None, None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1.0 else (cos * rope.attention_factor, sin * rope.attention_factor)


def apply_rope(x_nthk: jax.Array, tables: RopeTables, *, interleaved: bool = False) -> jax.Array:
    """Rotates pairs (i, i + r/2) of the first r elements of each head; the rest is unchanged.

    Args:
      interleaved: True for pairs of neighbours, (2i, 2i + 1).
    """
    cos, sin = tables
    num_pairs = cos.shape[-1]
    if interleaved:
        return _rotate_neighbours(x_nthk, cos, sin)
    wide = x_nthk.astype(cos.dtype)
    # Element i is paired with i + r/2, not with i + 1 as in the paper: most of Hugging Face's weights are permuted
    # accordingly.
    first, second, rest = wide[..., :num_pairs], wide[..., num_pairs : 2 * num_pairs], wide[..., 2 * num_pairs :]
    # A family with partial rotation leaves the end of each head as it is.
    rotated = [first * cos - second * sin, second * cos + first * sin, *([rest] if rest.shape[-1] else [])]
    return jnp.concatenate(rotated, axis=-1).astype(x_nthk.dtype)


@jax.custom_vjp
def _rotate_neighbours(x_nthk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (2i, 2i + 1), the layout of the paper (RoFormer, arXiv 2104.09864)."""
    num_dims = 2 * cos.shape[-1]
    turned, rest = x_nthk[..., :num_dims], x_nthk[..., num_dims:]
    # Neighbours are exchanged by shifts of the whole head; pairs as an axis of length two would fill 2 of 128 lanes of
    # a TPU's registers. Shifted before they are widened, since a shift is written to memory.
    is_first = np.arange(num_dims) % 2 == 0
    partner = jnp.where(is_first, -jnp.roll(turned, -1, -1), jnp.roll(turned, 1, -1))
    rotated = turned.astype(cos.dtype) * jnp.repeat(cos, 2, -1) + partner.astype(cos.dtype) * jnp.repeat(sin, 2, -1)
    return jnp.concatenate([rotated.astype(x_nthk.dtype), rest], -1) if rest.shape[-1] else rotated.astype(x_nthk.dtype)


def _rotate_forward(x_nthk: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, RopeTables]:
    return _rotate_neighbours(x_nthk, cos, sin), (cos, sin)


def _rotate_backward(tables: RopeTables, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    # The transpose of a rotation is the rotation by the opposite angle, rounded once as well.
    cos, sin = tables
    return _rotate_neighbours(cotangent, cos, -sin), None, None


_rotate_neighbours.defvjp(_rotate_forward, _rotate_backward)


def query_factors(positions_nt: jax.Array, scaling: QueryScaling | None, dtype: Any) -> jax.Array | None:
    """Returns the factor [n, t, 1, 1] of the query at each position, which broadcasts over heads; None without scaling.

    >>> factors = query_factors(jnp.array([[0, 15, 16]]), QueryScaling(beta=0.5, length=16), jnp.float32)
    >>> [round(float(factor), 2) for factor in factors.ravel()]
    [1.0, 1.0, 1.35]
    """
    if scaling is None:
        return None
    blocks = positions_nt[:, :, None, None] // scaling.length
    return 1 + scaling.beta * jnp.log1p(blocks.astype(dtype))
