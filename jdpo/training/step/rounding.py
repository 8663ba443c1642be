"""Stochastic rounding to bfloat16, for weights and moments that change by less than the last bit.

A bfloat16 has 8 significant bits: neighbours are 0.4 to 0.8 % apart. Rounded to nearest, an update of 0.1 % has no
effect, however often it is repeated. Rounded up or down with probabilities given by the remainder, it has its effect in
the mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any

HALF = 16  # bits of a float32 that a bfloat16 lacks, and random bits for rounding one


def wide(tree: Tree) -> Tree:
    """Converts leaves to float32, for arithmetic; float32 and float64 stay as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def stochastic_round(values: Array, bits: Array) -> Array:
    """Rounds to one of the two bfloat16 neighbours, to the nearer one more often, so that the mean is the value.

    Exact bfloat16 values, infinities and NaN stay as they are. Between the largest bfloat16 and the next power of two,
    the upper neighbour is infinity. (Stochastic rounding: Gupta et al., arXiv 1502.02551.)

    Args:
      values: float32.
      bits: uint16 of the same shape, uniform.

    Returns:
      bfloat16.

    >>> between = jnp.full(4, 1 + 2**-9)  # a quarter of the way from 1 to its neighbour, 1 + 2**-7
    >>> stochastic_round(between, jnp.array([0, 0x4000, 0xBFFF, 0xC000], jnp.uint16)).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    assert values.dtype == jnp.float32, values.dtype
    assert bits.dtype == jnp.uint16, bits.dtype
    # The bits of a float are ordered as its magnitude: a carry out of the lower half is the next bfloat16.
    carried = jax.lax.bitcast_convert_type(values, jnp.uint32) + bits
    # Its upper half is taken as it is: a conversion may flush the smallest numbers to zero.
    rounded = jax.lax.bitcast_convert_type((carried >> HALF).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def store(values: Sequence[Tree], like: Sequence[Tree], key: Array) -> list[Tree]:
    """Converts trees to the dtypes of others, with stochastic rounding to bfloat16.

    The random bits depend only on the key, the name of the leaf and the index (`jax_threefry_partitionable`, jax's
    default), not on the mesh or the rest of the tree. A draw has bits for two leaves: those of two trees at one path
    share it.

    Args:
      values: one or two trees of one structure, float32 where `like` is bfloat16.
      like: as many trees, of the dtypes to store in.
      key: must not be used for anything else.
    """
    assert 1 <= len(values) == len(like) <= 2, (len(values), len(like))
    columns = zip(*map(jax.tree.leaves, values), *map(jax.tree.leaves, like), strict=True)
    stored = []
    for (path, _), leaves in zip(jax.tree_util.tree_leaves_with_path(like[0]), columns, strict=True):
        new, old = leaves[: len(values)], leaves[len(values) :]
        if any(leaf.dtype == jnp.bfloat16 for leaf in old):
            # By name and not by position, so that another tree does not change the bits of a leaf.
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            stored.append(list(map(_stored, new, old, _halves(jax.random.fold_in(key, name), new[0].shape))))
        else:
            stored.append([leaf.astype(like.dtype) for leaf, like in zip(new, old, strict=True)])
    structure: Any = jax.tree.structure(like[0])
    return [structure.unflatten(leaves) for leaves in zip(*stored, strict=True)]


def _halves(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    draw = jax.random.bits(key, shape, jnp.uint32)
    return draw.astype(jnp.uint16), (draw >> HALF).astype(jnp.uint16)


def _stored(new: Array, old: Array, bits: Array) -> Array:
    return stochastic_round(new, bits) if old.dtype == jnp.bfloat16 else new.astype(old.dtype)


def apply_updates(params: Tree, updates: Tree, key: Array) -> Tree:
    """Adds updates to weights in float32, like `optax.apply_updates`, and rounds bfloat16 weights stochastically.

    Args:
      params: a tree of weights.
      updates: a tree like it, float32 or wider.
      key: for the rounding of this update; not used if no weight is bfloat16.
    """
    (stored,) = store([jax.tree.map(jnp.add, wide(params), updates)], [params], key)
    return stored
