"""Looks up rows of the token table, with a gradient that is summed in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `table[tokens]`; the gradient of a bfloat16 table is summed in float32 and rounded once.

    Summed in bfloat16, the gradient of a frequent token would stop changing as soon as the contribution of one position
    is below 0.4 % of the sum.

    Args:
      table: float [v, d].
      tokens: int [...], ids in [0, v).

    Returns:
      [..., d] in the table's dtype.
    """
    if table.dtype == jnp.bfloat16:
        return _narrow_lookup(table.shape[0], table, tokens)
    return jnp.take(table, tokens, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_lookup(num_rows: int, table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table, tokens, axis=0)


def _forward(num_rows: int, table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.take(table, tokens, axis=0), tokens


def _backward(num_rows: int, tokens: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    # [v, d] in float32, rounded only after the contributions of all positions are in.
    zeros = jnp.zeros((num_rows, cotangent.shape[-1]), jnp.float32)
    return zeros.at[tokens].add(cotangent.astype(jnp.float32)).astype(cotangent.dtype), None


_narrow_lookup.defvjp(_forward, _backward)
