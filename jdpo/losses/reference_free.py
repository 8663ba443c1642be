"""Losses without a reference, each of its own pair. The notation is that of `jdpo.loss_specs`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jdpo.losses.pairwise import LossInputs, per_token

Array = jax.Array

SMALLEST_NLL = 1e-6
"""Means of log-probs closer to 0 than this are set to minus this: at 0, the odds would be infinite."""


def log1mexp(x: Array) -> Array:
    """Computes log(1 - exp(x)) for x < 0, accurately at both ends.

    >>> import jax.numpy as jnp
    >>> log1mexp(jnp.array([-1e-6, -0.693147, -50.0])).round(3).tolist()
    [-13.8..., -0.69..., ...0.0]
    """
    # Near 0, 1 - exp(x) loses its digits and expm1 keeps them; far below, log1p keeps those of the result.
    # They are equally accurate at x = -ln 2, where exp(x) is 1/2.
    return jnp.where(x > -math.log(2), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def simpo(x: LossInputs) -> Array:
    """-ls(beta (m_w - m_l) - simpo_gamma).

    At beta = 2, l_w = -3, n_w = 3, l_l = -4, n_l = 2, simpo_gamma = 0.5: -ls(2 - 0.5) = 0.201413.
    """
    gap = per_token(x.chosen_logps, x.chosen_lengths) - per_token(x.rejected_logps, x.rejected_lengths)
    return -jax.nn.log_sigmoid(x.beta * gap - x.options["simpo_gamma"])


def cpo(x: LossInputs) -> Array:
    """-ls(beta (l_w - l_l)) + cpo_alpha sft: a preference term without a reference, plus the likelihood of chosen.

    At beta = 0.1, l_w = -3, l_l = -4, cpo_alpha = 1, N = 3: 0.644397 + 1 = 1.644397.
    """
    return -jax.nn.log_sigmoid(x.beta * (x.chosen_logps - x.rejected_logps)) + x.options["cpo_alpha"] * sft(x)


def orpo(x: LossInputs) -> Array:
    """-m_w - orpo_lambda ls(log odds of chosen - log odds of rejected), with odds p / (1-p) of p = exp(m).

    At l_w = -3, n_w = 3, l_l = -4, n_l = 2, orpo_lambda = 0.1: log odds -0.541325 and -1.854587,
    1 - 0.1 ls(1.313262) = 1.023818.
    """
    chosen, rejected = per_token(x.chosen_logps, x.chosen_lengths), per_token(x.rejected_logps, x.rejected_lengths)
    # The difference of log odds, log p - log(1 - p), without computing the probabilities.
    gap = (chosen - rejected) - (_log_one_minus(chosen) - _log_one_minus(rejected))
    return -chosen - x.options["orpo_lambda"] * jax.nn.log_sigmoid(gap)


def _log_one_minus(mean_logp: Array) -> Array:
    # Nearer to 0, exp(x) rounds to 1. The branch of log1mexp that is not taken then has an infinite slope, and the
    # gradient would be 0 * inf, which is NaN.
    return log1mexp(jnp.minimum(mean_logp, -SMALLEST_NLL))


def simper(x: LossInputs) -> Array:
    """-exp(m_w) + exp(m_l): minus the inverse perplexity of the chosen completion, plus that of the rejected one.

    At l_w = -3, n_w = 3, l_l = -4, n_l = 2: -exp(-1) + exp(-2) = -0.367879 + 0.135335 = -0.232544.
    """
    chosen, rejected = per_token(x.chosen_logps, x.chosen_lengths), per_token(x.rejected_logps, x.rejected_lengths)
    # Both are in (0, 1], so neither the loss nor its gradient needs a guard.
    return jnp.exp(rejected) - jnp.exp(chosen)


def sft(x: LossInputs) -> Array:
    """-l_w / N: divided by the chosen tokens per pair, so that its mean over pairs is the mean over chosen tokens.

    For l_w = (-3, -5) with 3 and 1 tokens, N = 2: (1.5, 2.5), whose mean 2 is 8 nats over 4 tokens.

    At l_w = -3, N = 3: 3 / 3 = 1.0.
    """
    return x.chosen_nll / x.mean_chosen_tokens


FUNCTIONS = {
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "simper": simper,
    "sft": sft,
}
"""The losses of this file by name."""
