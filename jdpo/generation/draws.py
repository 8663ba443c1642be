"""Draws the next token of each row from its logits, without sorting the vocabulary.

Axes: n rows, v vocabulary, b blocks of l tokens each, m weights to choose from.

top_p is exact. A token belongs to the set if the tokens that are more probable than it have less than top_p together,
which takes one masked sum to decide. So a token is drawn from all, and decided; where it is outside of the set, so are
all that are no more probable, and the next is drawn from the others. A draw that is kept has the distribution of the
set, because each round draws in proportion to the probabilities and no token of the set is ever left out. With top_p
0.95 one round in twenty has to be repeated, and the rounds of any logits are few, as each one leaves about half of the
remaining tokens out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdpo.generation.values import Sampling

# Tokens per block: a draw chooses a block by the sums of all, then a token in it.
_BLOCK = 128


class _Round(NamedTuple):
    number: jax.Array  # int32 []
    floor: jax.Array  # float32 [n], only tokens with larger logits are drawn
    tokens: jax.Array  # int32 [n]
    done: jax.Array  # bool [n]


def draw(logits_nv: jax.Array, keys_n: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row; a row's draw depends on its own logits and key alone.

    The order is that of transformers: temperature, then top_k, then top_p of what top_k leaves. Tokens that are exactly
    as probable as the least probable one of the set belong to the set as well. At temperature 0 the most probable
    token is taken, the first of several.

    Args:
      logits_nv: of any float dtype; -inf excludes a token.
      keys_n: PRNG keys; not read at temperature 0.
      sampling: static under jit. `max_new_tokens` and `seed` are not read.

    Returns:
      tokens int32 [n], and their log-probabilities float32 [n] under the model itself: temperature 1, all tokens. The
      log-probability is NaN if the logits of a row contain NaN or +inf, or only -inf.
    """
    logits_nv = logits_nv.astype(jnp.float32)
    peak_n = jnp.max(logits_nv, axis=-1)
    log_total_n = peak_n + jnp.log(jnp.sum(jnp.exp(logits_nv - peak_n[:, None]), axis=-1))
    if sampling.temperature == 0:
        tokens_n = _first(logits_nv == peak_n[:, None])
    else:
        tokens_n = _draw(logits_nv, peak_n, keys_n, sampling)
    chosen_n = jnp.take_along_axis(logits_nv, tokens_n[:, None], axis=-1)[:, 0]
    return tokens_n, chosen_n - log_total_n


def _draw(logits_nv: jax.Array, peak_n: jax.Array, keys_n: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.top_k is not None and sampling.top_k < logits_nv.shape[-1]:
        # Without the barrier XLA sees that one column is read, and sorts the vocabulary instead: 90 times slower.
        largest_nk = jax.lax.optimization_barrier(jax.lax.top_k(logits_nv, sampling.top_k)[0])
        least_n1 = largest_nk[:, -1:]
        logits_nv = jnp.where(logits_nv < least_n1, -jnp.inf, logits_nv)
    # Not below the smallest normal number, which a float32 division may take for 0.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    weights_nv = jnp.exp((logits_nv - peak_n[:, None]) / temperature)
    if sampling.top_p == 1:
        return _draw_in_proportion(weights_nv, keys_n)
    bound_n = sampling.top_p * jnp.sum(weights_nv, axis=-1)

    def repeat(state: _Round) -> _Round:
        candidates_nv = jnp.where(logits_nv > state.floor[:, None], weights_nv, 0)
        drawn_n = _draw_in_proportion(candidates_nv, jax.vmap(jax.random.fold_in, (0, None))(keys_n, state.number))
        tokens_n = jnp.where(state.done, state.tokens, drawn_n)
        found_n = jnp.take_along_axis(logits_nv, tokens_n[:, None], axis=-1)[:, 0]
        above_n = jnp.sum(jnp.where(logits_nv > found_n[:, None], weights_nv, 0), axis=-1)
        # Not `above < bound`, so that NaN ends the rounds as well.
        return _Round(state.number + 1, found_n, tokens_n, ~(above_n >= bound_n))

    num_rows = logits_nv.shape[0]
    floor_n, none = jnp.full(num_rows, -jnp.inf), jnp.zeros(num_rows, jnp.int32)
    start = _Round(jnp.int32(0), floor_n, none, jnp.zeros(num_rows, bool))
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), repeat, start).tokens


def _draw_in_proportion(weights_nv: jax.Array, keys_n: jax.Array) -> jax.Array:
    """Draws from weights of at least 0, with two random numbers per row instead of one per token."""
    num_blocks = -(-weights_nv.shape[-1] // _BLOCK)
    filled_nv = jnp.pad(weights_nv, ((0, 0), (0, num_blocks * _BLOCK - weights_nv.shape[-1])))
    weights_nbl = filled_nv.reshape(-1, num_blocks, _BLOCK)
    uniform_n2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_n)
    # In two steps, because float32 cannot add up a large vocabulary one by one without losing its rare tokens.
    block_n = _choose(jnp.sum(weights_nbl, axis=-1), uniform_n2[:, 0])
    within_nl = jnp.take_along_axis(weights_nbl, block_n[:, None, None], axis=1)[:, 0]
    return block_n * _BLOCK + _choose(within_nl, uniform_n2[:, 1])


def _choose(weights_nm: jax.Array, uniform_n: jax.Array) -> jax.Array:
    """Inverts the cumulative sum; never chooses a weight of 0 if there is another."""
    sums_nm = jnp.cumsum(weights_nm, axis=-1)
    positive_nm = weights_nm > 0
    # Rounding can make the sum rise, or even fall, where a weight is 0.
    found_n = _first((sums_nm > uniform_n[:, None] * sums_nm[:, -1:]) & positive_nm)
    last_n = jnp.max(jnp.where(positive_nm, jnp.arange(weights_nm.shape[-1], dtype=jnp.int32), 0), axis=-1)
    return jnp.minimum(found_n, last_n)


def _first(found_nm: jax.Array) -> jax.Array:
    """Returns the first True of each row, the last index if there is none; XLA's argmax is slow on the CPU."""
    last = found_nm.shape[-1] - 1
    return jnp.min(jnp.where(found_nm, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)
