"""The einsum of projections has the gradients of JAX's own einsum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.layers import project

CASES = {
    "ntd,df->ntf": ((2, 5, 4), (4, 3)),
    "ntd,dhk->nthk": ((2, 5, 4), (4, 3, 2)),
    "nthk,hkd->ntd": ((2, 5, 3, 2), (3, 2, 4)),
}


@pytest.mark.parametrize("equation", CASES)
def test_values_and_gradients(equation: str) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in CASES[equation])
        found, pull = jax.vjp(lambda *args: project(equation, *args), x, kernel)
        expected, pull_plain = jax.vjp(lambda *args: jnp.einsum(equation, *args), x, kernel)
        cotangent = jnp.asarray(rng.normal(size=found.shape))
        np.testing.assert_allclose(found, expected, rtol=1e-13)
        for gradient, plain in zip(pull(cotangent), pull_plain(cotangent), strict=True):
            np.testing.assert_allclose(gradient, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("product", "transposes"), [(project, False), (jnp.einsum, True)])
def test_the_wide_cotangent_is_not_transposed(product: Callable[..., jax.Array], transposes: bool) -> None:
    """Checks that the kernel's gradient is one product of [d, n t] with the untransposed cotangent.

    JAX's own rule transposes it; if that ever changes, `project` is no longer needed.
    """
    x, kernel, cotangent = jnp.zeros((1, 96, 16)), jnp.zeros((16, 64)), jnp.zeros((1, 96, 64))

    def gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: product("ntd,df->ntf", x, kernel), kernel)[1](cotangent)[0]

    text = jax.jit(gradient).lower(x, kernel, cotangent).compile().as_text()
    assert "f32[96,64]" in text or "f32[1,96,64]" in text
    assert ("f32[64,96]" in text) == transposes


def test_bfloat16_gradients_keep_their_dtypes() -> None:
    x, kernel = jnp.ones((1, 3, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    gradients = jax.grad(lambda *args: project("ntd,df->ntf", *args).astype(jnp.float32).sum(), (0, 1))(x, kernel)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
