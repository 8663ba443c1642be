"""xIELU, an activation function with learned parameters (arXiv 2411.13010).

    f(x) = a_p x^2 + beta x                                  for x > 0
    f(x) = a_n (exp(min(x, eps)) - 1 - x) + beta x           otherwise

with a_p = softplus(alpha_p) and a_n = beta + softplus(alpha_n), so that both curvatures stay positive. Each layer has
its own alpha_p and alpha_n, [1]. beta and eps are constants, but checkpoints have them next to the other two.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

XIELU_PARAMETERS = ("alpha_p", "alpha_n", "beta", "eps")
_INITIAL_CURVATURE, _BETA, _EPS = 0.8, 0.5, -1e-6


class XIELU(nn.Module):
    """Applies the function elementwise, in float32 or wider."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        alpha_p = self._param("alpha_p", (1,), _inverse_softplus(_INITIAL_CURVATURE)).astype(dtype)
        alpha_n = self._param("alpha_n", (1,), _inverse_softplus(_INITIAL_CURVATURE - _BETA)).astype(dtype)
        # Parameters only so that they are read and exported: their gradients are 0.
        beta = jax.lax.stop_gradient(self._param("beta", (), _BETA).astype(dtype))
        eps = jax.lax.stop_gradient(self._param("eps", (), _EPS).astype(dtype))
        return xielu(x, jax.nn.softplus(alpha_p), beta + jax.nn.softplus(alpha_n), beta, eps)

    def _param(self, name: str, shape: tuple[int, ...], value: float) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(value), (None,) * len(shape))
        return self.param(name, init, shape, self.param_dtype)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


@jax.custom_vjp
def xielu(x: jax.Array, curvature_p: jax.Array, curvature_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns f(x) in the dtype of x, with a_p and a_n [1] given.

    The gradient keeps nothing but x for the backward pass, and it is a_n (exp(x) - 1) + beta also between eps and 0,
    which continues that of both sides. No gradient is computed for beta and eps.
    """
    wide = x.astype(curvature_p.dtype)
    curved = jnp.where(wide > 0, curvature_p * _above(wide), curvature_n * _below(wide, eps))
    return (curved + beta * wide).astype(x.dtype)


def _above(wide: jax.Array) -> jax.Array:
    return wide * wide


def _below(wide: jax.Array, eps: jax.Array) -> jax.Array:
    # Without the limit exp would overflow for large x, whose gradient is then NaN although it is not selected.
    return jnp.expm1(jnp.minimum(wide, eps)) - wide


def _forward(x: jax.Array, *constants: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return xielu(x, *constants), (x, *constants)


def _backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    x, curvature_p, curvature_n, beta, eps = residuals
    wide, wide_cotangent = (values.astype(curvature_p.dtype) for values in (x, cotangent))
    is_above = wide > 0
    slope = jnp.where(is_above, 2 * curvature_p * wide, curvature_n * jnp.expm1(jnp.minimum(wide, eps))) + beta
    of_p = jnp.sum(jnp.where(is_above, wide_cotangent * _above(wide), 0))[None]
    of_n = jnp.sum(jnp.where(is_above, 0, wide_cotangent * _below(wide, eps)))[None]
    return (wide_cotangent * slope).astype(x.dtype), of_p, of_n, None, None


xielu.defvjp(_forward, _backward)
