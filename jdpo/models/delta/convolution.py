"""A causal convolution of each channel over the last few tokens of its sequence.

Axes: n sequences, t places, w taps, z.. heads and their width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class CausalConvolution(nn.Module):
    """Taps [z.., w] for every channel; the last one is multiplied with the token itself. SiLU follows.

    Attributes:
      width: w.
      axes: logical names of the channels' axes.
    """

    width: int
    axes: tuple[str | None, ...]
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, starts_nt: jax.Array | None) -> jax.Array:
        """Returns the convolved tokens, rounded once.

        Args:
          x: [n, t, z..], or windows [n, t, w, z..] where starts_nt is None.
          starts_nt: int [n, t], the place where the sequence of each place starts; tokens before it count as 0.
        """
        num_channels = len(self.axes)
        channels = x.shape[x.ndim - num_channels :]
        # As torch initializes a convolution, by its fan-in.
        init = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), (*self.axes, None))
        taps = self.param("taps", init, (*channels, self.width), self.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        # Rounded as all weights of products are, but summed in float32.
        taps = taps.astype(x.dtype).astype(wide)
        seen = (x[:, :, i] for i in range(self.width)) if starts_nt is None else _windows(x, starts_nt, self.width)
        total = sum(taps[..., i] * tokens.astype(wide) for i, tokens in enumerate(seen))
        return nn.silu(jnp.asarray(total)).astype(x.dtype)


def _windows(x: jax.Array, starts_nt: jax.Array, width: int) -> list[jax.Array]:
    """Returns for each tap the tokens that it is multiplied with, [n, t, z..], the earliest first."""
    seen = []
    for distance in range(width - 1, -1, -1):
        shifted = jnp.pad(x, [(0, 0), (distance, 0), *[(0, 0)] * (x.ndim - 2)])[:, : x.shape[1]]
        # Selected, not multiplied by 0: the token before a start belongs to another sequence.
        is_own = jnp.arange(x.shape[1]) - distance >= starts_nt
        seen.append(jnp.where(is_own[(..., *[None] * (x.ndim - 2))], shifted, 0))
    return seen


def last_tokens(x: jax.Array, lengths_n: jax.Array, num_tokens: int) -> jax.Array:
    """Returns the last tokens [n, num_tokens, z..] of right-padded sequences [n, t, z..]; 0 before their starts.

    >>> last_tokens(jnp.arange(1, 6)[None], jnp.array([2]), 3).tolist()
    [[0, 1, 2]]
    """
    at = lengths_n[:, None] - num_tokens + jnp.arange(num_tokens)
    own = jnp.take_along_axis(x, jnp.maximum(at, 0)[(..., *[None] * (x.ndim - 2))], axis=1)
    return jnp.where((at >= 0)[(..., *[None] * (x.ndim - 2))], own, 0)
