"""The load-balancing loss of routers, for mixtures of experts.

Axes: m sequences or rows, e experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdpo.types import AnyArray, RouterStats

Array = jax.Array


def load_balancing_loss(stats: RouterStats) -> Array:
    """Computes E sum_e f_e p_e over the tokens of all sequences and layers (Switch Transformer, arXiv 2101.03961).

    f_e is the number of times that expert e is chosen, per token; as a count, it carries no gradient. p_e is the mean
    probability of expert e. With k of E experts per token, the loss is k for an even load, and at most E. It equals
    load_balancing_loss_func of transformers, with weights for tokens.

    Returns:
      a scalar.

    For two tokens that both choose the first of two experts, with probabilities 0.75 and 0.25:

    >>> stats = RouterStats(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.5]]), jnp.array([2.0]))
    >>> float(load_balancing_loss(stats))
    1.5
    """
    # Sums first, then the ratio: the mean over tokens of the global batch, not a mean of means.
    num_tokens = stats.tokens.sum()
    chosen_e, probability_e = (values.sum(0) / num_tokens for values in (stats.assignments, stats.probabilities))
    return chosen_e.shape[0] * (chosen_e * probability_e).sum()


def of_real_rows(stats: RouterStats, real: AnyArray) -> RouterStats:
    """Returns the counts with zeros for rows that are not real, bool [m], whatever they contain."""
    # where, not a product: padding rows may contain NaN.
    return RouterStats(*(jnp.where(real.reshape(real.shape + (1,) * (values.ndim - 1)), values, 0) for values in stats))
