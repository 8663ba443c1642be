"""xIELU by hand, and its gradient against JAX's own of the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.xielu import XIELU, xielu

CONSTANTS = [np.array([0.7]), np.array([0.9]), np.array(0.5), np.array(-1e-6)]
"""a_p, a_n, beta, eps."""


def test_by_hand() -> None:
    x = jnp.array([2.0, 0.0, -1.0, -40.0])
    # 0.7 * 2^2 + 0.5 * 2; about 0; 0.9 * (1 / e - 1 + 1) - 0.5; 0.9 * (0 - 1 + 40) - 20
    expected = [3.8, 0.0, 0.9 / np.e - 0.5, 15.1]
    np.testing.assert_allclose(xielu(x, *map(jnp.asarray, CONSTANTS)), expected, atol=1e-5)


def test_fresh_curvatures_are_those_of_the_paper() -> None:
    model = XIELU(jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros(1))
    np.testing.assert_allclose(model.apply(params, jnp.array([2.0, -1.0])), [0.8 * 4 + 1, 0.8 / np.e - 0.5], rtol=1e-6)


def test_the_gradient_is_that_of_the_formula() -> None:
    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(values) for values in np.random.default_rng(0).normal(size=(2, 3, 5, 7)))

        def formula(x: jax.Array, p: jax.Array, n: jax.Array) -> jax.Array:
            return jnp.where(x > 0, p * x * x + 0.5 * x, n * (jnp.expm1(jnp.minimum(x, -1e-6)) - x) + 0.5 * x)

        p, n, *constants = map(jnp.asarray, CONSTANTS)
        expected = jax.grad(lambda *inputs: jnp.sum(formula(*inputs) * cotangent), (0, 1, 2))(x, p, n)
        found = jax.grad(lambda *inputs: jnp.sum(xielu(*inputs, *constants) * cotangent), (0, 1, 2))(x, p, n)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_the_gradient_is_continuous_at_zero_and_finite_far_from_it() -> None:
    slope = jax.grad(lambda x: xielu(x, *map(jnp.asarray, CONSTANTS)).sum())
    np.testing.assert_allclose(slope(jnp.array([-1e-5, -1e-7, 0.0, 1e-7])), 0.5, atol=1e-4)
    np.testing.assert_allclose(slope(jnp.array([1e4, -1e4])), [1.4e4 + 0.5, -0.4], rtol=1e-6)


def test_only_the_curvatures_are_trained() -> None:
    model = XIELU(jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros(1))
    x = jnp.array([1.5, -0.5], jnp.bfloat16)
    assert model.apply(params, x).dtype == jnp.bfloat16
    grads = jax.grad(lambda params: model.apply(params, x).sum().astype(jnp.float32))(params)["params"]
    found = {name: float(abs(box.value).sum()) for name, box in grads.items()}
    assert {name for name, size in found.items() if size} == {"alpha_p", "alpha_n"}
    # softplus(alpha_p)' x^2 with softplus(alpha_p) = 0.8
    assert found["alpha_p"] == pytest.approx((1 - np.exp(-0.8)) * 1.5**2, rel=1e-3)
