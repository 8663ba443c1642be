"""Rows that hold several sequences back to back, as attention sees them.

Axes: n rows, u sequences of a row, t places of a row.

    lengths (u = 3)    3  2  0
    places (t = 7)     A0 A1 A2 B0 B1 -  -
    segments           0  0  0  3  3  5  5     the place where each sequence starts; padding is a sequence of its own
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


def segment_starts(lengths_nu: Array, num_places: int) -> Array:
    """Returns int32 [n, t], the place where the sequence of each place starts.

    Two places of a row belong to one sequence exactly if they have the same number, and a query sees no key before it.
    The padding after the last sequence is a segment that starts there.

    Args:
      lengths_nu: int [n, u], tokens of the sequences of a row in order, 0 for none; a numpy or a JAX array.

    >>> segment_starts(np.array([[3, 2, 0]]), 7).tolist()
    [[0, 0, 0, 3, 3, 5, 5]]
    """
    xp = jnp if isinstance(lengths_nu, jax.Array) else np
    ends_n1u = xp.cumsum(lengths_nu, axis=1, dtype=np.int32)[:, None]
    places_t1 = np.arange(num_places, dtype=np.int32)[:, None]
    # A sequence starts where the latest one that ends at or before its places ends; empty ones end there, too.
    return xp.where(ends_n1u <= places_t1, ends_n1u, 0).max(2)
