"""Losses with a frozen reference, each of its own pair.

The notation is that of `jdpo.loss_specs`: a and b are policy minus reference log-prob of chosen and rejected, D = a - b
(through the scores of an f-divergence, if there is one), s the sigmoid and ls its logarithm. All arrays are [b]. Every
docstring has the formula and a value derived by hand, which the tests check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

LARGEST_RESIDUAL = 1e18
"""Residuals are clipped here before squaring: the square of a larger one is infinite in float32."""

LARGEST_EXPONENT = 80.0
"""Exponents are limited to this: exp of a larger one is infinite in float32."""


class LossInputs(NamedTuple):
    """The inputs of a loss. Arrays are float [b]; fields that none of the losses at hand needs are None."""

    chosen_logps: Array  # l_w
    rejected_logps: Array  # l_l
    chosen_logratios: Array  # a
    rejected_logratios: Array  # b
    reference_margins: Array  # reference log-prob of chosen minus rejected
    chosen_scores: Array  # a, through the f-divergence
    rejected_scores: Array  # b, through the f-divergence
    chosen_lengths: Array  # n_w
    rejected_lengths: Array  # n_l
    chosen_nll: Array  # -l_w, every token at its full weight
    mean_chosen_tokens: Array  # scalar: chosen tokens of the global batch / its pairs
    real: Array  # bool [b], False for padding pairs; None: all are real
    score_margins: Array  # g; None without an option that reads scores
    beta: Array | float
    options: Mapping[str, Array | float]  # every number of jdpo.losses.settings.DEFAULTS

    @property
    def margin(self) -> Array:
        """z without an offset: beta D."""
        return self.beta * (self.chosen_scores - self.rejected_scores)

    def less_offset(self, margin: Array) -> Array:
        """Returns margin - o, where o = margin_gamma log(g) is the offset of ODPO (arXiv 2402.10571, section 4)."""
        if self.score_margins is None:  # Subtracting 0 would change the program of every run without scores.
            return margin
        return margin - self.options["margin_gamma"] * jnp.log(self.score_margins)

    @property
    def smoothing(self) -> Array | float:
        """e, the label smoothing."""
        return self.options["label_smoothing"]


def per_token(total: Array, lengths: Array) -> Array:
    """Returns total / length, 0 for a completion without tokens."""
    return total / jnp.maximum(lengths, 1)


def smoothed(margin: Array, smoothing: Array | float) -> Array:
    """Returns -(1-e) ls(z) - e ls(-z), the cross-entropy against a label that is right with probability 1 - e."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def square(residual: Array) -> Array:
    """Returns residual^2, constant beyond LARGEST_RESIDUAL, so that it and its gradient are finite in float32."""
    return jnp.square(jnp.clip(residual, -LARGEST_RESIDUAL, LARGEST_RESIDUAL))


def sigmoid(x: LossInputs) -> Array:
    """-(1-e) ls(z) - e ls(-z), z = beta D - o: DPO, cDPO where e > 0, and ODPO with an offset o.

    At beta = 0.1, a = 3, b = -1: D = 4, -ls(0.4) = 0.513015.
    """
    return smoothed(x.less_offset(x.margin), x.smoothing)


def robust(x: LossInputs) -> Array:
    """[-(1-e) ls(z) + e ls(-z)] / (1-2e), z = beta D - o: unbiased if a share e of the labels is flipped.

    At beta = 0.1, D = 4, e = 0.1: (0.9 * 0.513015 - 0.1 * 0.913015) / 0.8 = 0.463015.
    """
    margin = x.less_offset(x.margin)
    clean, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1 - x.smoothing) * clean - x.smoothing * flipped) / (1 - 2 * x.smoothing)


def hinge(x: LossInputs) -> Array:
    """max(0, 1 - beta D).

    At beta = 0.1, D = 4: 1 - 0.4 = 0.6.
    """
    return jax.nn.relu(1 - x.margin)


def ipo(x: LossInputs) -> Array:
    """(a/n_w - b/n_l - 1/(2 beta))^2: log-ratios averaged over tokens, as the authors agreed with TRL.

    At beta = 0.1, a = 3, n_w = 3, b = -1, n_l = 2: (1 + 0.5 - 5)^2 = 12.25.
    """
    gap = per_token(x.chosen_scores, x.chosen_lengths) - per_token(x.rejected_scores, x.rejected_lengths)
    return square(gap - 1 / (2 * x.beta))


def ipo_sum(x: LossInputs) -> Array:
    """(D - 1/(2 beta))^2, the paper's own form.

    At beta = 0.1, D = 4: (4 - 5)^2 = 1.0.
    """
    return square(x.chosen_logratios - x.rejected_logratios - 1 / (2 * x.beta))


def sigmoid_norm(x: LossInputs) -> Array:
    """-ls(beta (a/n_w - b/n_l) - o): DPO normalised by length.

    At beta = 5, a = 3, n_w = 3, b = -1, n_l = 2: -ls(7.5) = 0.000553.
    """
    gap = per_token(x.chosen_scores, x.chosen_lengths) - per_token(x.rejected_scores, x.rejected_lengths)
    return -jax.nn.log_sigmoid(x.less_offset(x.beta * gap))


def exo_pair(x: LossInputs) -> Array:
    """s(beta D) [ls(beta D) - log(1-e)] + s(-beta D) [ls(-beta D) - log e]: reverse KL to the smoothed label.

    At beta = 0.1, D = 4, e = 0.1: 0.598688 (-0.513015 + 0.105361) + 0.401312 (-0.913015 + 2.302585) = 0.313594.
    """
    margin, e = x.margin, x.smoothing
    chosen = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-e))
    rejected = jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(e))
    return chosen + rejected


def nca_pair(x: LossInputs) -> Array:
    """-ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2.

    At beta = 0.1, a = 3, b = -1: 0.554355 + 0.854355/2 + 0.644397/2 = 1.303731.
    """
    chosen, rejected = x.beta * x.chosen_logratios, x.beta * x.rejected_logratios
    return -jax.nn.log_sigmoid(chosen) - (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)) / 2


def bco_pair(x: LossInputs) -> Array:
    """-ls(beta a - delta) - ls(-(beta b - delta)), where delta is the mean reward: 0, given, or a running mean.

    At beta = 0.1, a = 3, b = -1, bco_delta = 0.2: -ls(0.1) - ls(0.3) = 0.644397 + 0.554355 = 1.198752.
    """
    delta = x.options["bco_delta"]
    chosen, rejected = x.beta * x.chosen_logratios, x.beta * x.rejected_logratios
    return -jax.nn.log_sigmoid(chosen - delta) - jax.nn.log_sigmoid(delta - rejected)


def sppo_hard(x: LossInputs) -> Array:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    At beta = 0.1, a = 3, b = -1: 4 + 16 = 20.0.
    """
    return square(x.chosen_logratios - 1 / (2 * x.beta)) + square(x.rejected_logratios + 1 / (2 * x.beta))


def apo_zero(x: LossInputs) -> Array:
    """1 - s(beta a) + s(beta b).

    At beta = 0.1, a = 3, b = -1: 1 - 0.574443 + 0.475021 = 0.900578.
    """
    # 1 - s(x) is written s(-x), which keeps its digits where s(x) is close to 1.
    return jax.nn.sigmoid(-x.beta * x.chosen_logratios) + jax.nn.sigmoid(x.beta * x.rejected_logratios)


def apo_down(x: LossInputs) -> Array:
    """s(beta a) + 1 - s(beta D).

    At beta = 0.1, a = 3, b = -1: 0.574443 + 0.401312 = 0.975755.
    """
    gap = x.chosen_logratios - x.rejected_logratios
    return jax.nn.sigmoid(x.beta * x.chosen_logratios) + jax.nn.sigmoid(-x.beta * gap)


def discopop(x: LossInputs) -> Array:
    """-ls(z) (1-m) + exp(-z) m, with z = beta D and m = s(z/tau).

    At beta = 0.1, D = 4, discopop_tau = 0.5: m = 0.689974, 0.513015 * 0.310026 + 0.670320 * 0.689974 = 0.621551.
    """
    z, tau = x.margin, x.options["discopop_tau"]
    # exp(-z) * s(z/tau) as a single exponential: at z = -1000 the product would be inf * 0.
    exponential = jnp.exp(jnp.minimum(-z + jax.nn.log_sigmoid(z / tau), LARGEST_EXPONENT))
    return -jax.nn.log_sigmoid(z) * jax.nn.sigmoid(-z / tau) + exponential


# --- the scores of f-DPO (arXiv 2309.16240): f'(u) at u = exp(r) replaces a log-ratio r; constants as in TRL 1.16

NEAREST_ALPHA = 1e-6
"""An alpha this close to 1 is treated as the limit, reverse KL."""


def divergence_score(logratios: Array, f_divergence_type: str, alpha: Array | float) -> Array:
    """Computes the score of a log-ratio r = log(policy / reference).

        reverse_kl         r
        forward_kl         1 - exp(-r)
        js_divergence      ln 2 + ls(r)
        alpha_divergence   (exp((alpha-1) r) - 1) / (alpha-1)

    Args:
      logratios: float [b].
      f_divergence_type: one of `jdpo.loss_specs.F_DIVERGENCES`.
      alpha: coefficient of alpha_divergence; a number or a traced scalar.

    Returns:
      float [b]; exponents are limited to 80, so that scores are finite.

    >>> import jax.numpy as jnp
    >>> from jdpo.loss_specs import F_DIVERGENCES
    >>> [round(divergence_score(jnp.float32(1.0), name, 0.5).item(), 4) for name in F_DIVERGENCES]
    [1.0, 0.6321, 0.3799, 0.7869]
    """
    if f_divergence_type == "reverse_kl":
        return logratios
    if f_divergence_type == "forward_kl":
        # expm1, since 1 - exp(-r) loses its digits near r = 0, where every run starts.
        return -jnp.expm1(jnp.minimum(-logratios, LARGEST_EXPONENT))
    if f_divergence_type == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(logratios)
    assert f_divergence_type == "alpha_divergence", f_divergence_type
    order = jnp.asarray(alpha, logratios.dtype) - 1
    is_limit = jnp.abs(order) < NEAREST_ALPHA
    order = jnp.where(is_limit, 1, order)  # The branch not taken must not divide by 0: its gradient would be NaN.
    return jnp.where(is_limit, logratios, jnp.expm1(jnp.minimum(order * logratios, LARGEST_EXPONENT)) / order)


FUNCTIONS = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}
"""The losses of this file by name."""
