"""The load balancing loss of mixture-of-experts routers.

Axes: m sequences or rows, e experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdpo.types import AnyArray, RouterStats

Array = jax.Array


def load_balancing_loss(stats: RouterStats) -> Array:
    """E sum_e f_e p_e over the tokens of all sequences and layers together, a scalar (Switch, arXiv 2101.03961).

    f_e are the choices of expert e a token, which sum to the number of experts of a token and carry no gradient: they
    are counts; p_e is the mean probability of it. With k of E experts a token it is k where the load is even, and E at
    most. As transformers' load_balancing_loss_func, of tokens that may have weights.

    Two tokens, both at the first of two experts, with probabilities 0.75 and 0.25:

    >>> stats = RouterStats(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.5]]), jnp.array([2.0]))
    >>> float(load_balancing_loss(stats))
    1.5
    """
    num_tokens = stats.tokens.sum()
    chosen_e, probability_e = (values.sum(0) / num_tokens for values in (stats.assignments, stats.probabilities))
    return chosen_e.shape[0] * (chosen_e * probability_e).sum()


def of_real_rows(stats: RouterStats, real: AnyArray) -> RouterStats:
    """The same where `real` [m] is true, zeros elsewhere, whatever stands there."""
    return RouterStats(*(jnp.where(real.reshape(real.shape + (1,) * (values.ndim - 1)), values, 0) for values in stats))
