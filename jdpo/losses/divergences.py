"""What f-DPO (arXiv 2309.16240) puts in the place of the log-ratio: f'(u) at u = exp(r), constants as in TRL 1.16."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.losses.pairwise import LARGEST_EXPONENT

Array = Any

NEAREST_ALPHA = 1e-6
"""An alpha this near to 1 is the limit, reverse KL."""


def divergence_score(logratios: Array, f_divergence_type: str, alpha: Array | float) -> Array:
    """The score of a log-ratio r = log(policy / reference).

        reverse_kl         r
        forward_kl         1 - exp(-r)
        js_divergence      ln 2 + ls(r)
        alpha_divergence   (exp((alpha-1) r) - 1) / (alpha-1)

    Args:
      logratios: float [b].
      f_divergence_type: one of `jdpo.loss_specs.F_DIVERGENCES`.
      alpha: coefficient of alpha_divergence; a number or a traced scalar.

    Returns:
      float [b]; exponents are held at 80, so that all is finite.

    >>> import jax.numpy as jnp
    >>> from jdpo.loss_specs import F_DIVERGENCES
    >>> [round(divergence_score(jnp.float32(1.0), name, 0.5).item(), 4) for name in F_DIVERGENCES]
    [1.0, 0.6321, 0.3799, 0.7869]
    """
    if f_divergence_type == "reverse_kl":
        return logratios
    if f_divergence_type == "forward_kl":
        return -jnp.expm1(jnp.minimum(-logratios, LARGEST_EXPONENT))
    if f_divergence_type == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(logratios)
    assert f_divergence_type == "alpha_divergence", f_divergence_type
    order = jnp.asarray(alpha, logratios.dtype) - 1
    is_limit = jnp.abs(order) < NEAREST_ALPHA
    order = jnp.where(is_limit, 1, order)  # the branch not taken must not divide by 0, for its gradient
    return jnp.where(is_limit, logratios, jnp.expm1(jnp.minimum(order * logratios, LARGEST_EXPONENT)) / order)
