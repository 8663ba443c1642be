"""Rotation of the two layouts of a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.model_config import RopeConfig
from jdpo.models.rope import apply_rope, rope_tables


@pytest.mark.parametrize(("fraction", "num_rotated"), [(1.0, 8), (0.5, 4)])
def test_neighbours_are_rotated_like_halves_of_the_permuted_head(fraction: float, num_rotated: int) -> None:
    tables = rope_tables(jnp.array([[0, 1, 5]]), RopeConfig(theta=100.0, fraction=fraction), 8, jnp.float32)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    # 0 2 4 .. 1 3 5 .., then those that are not rotated
    order = [*range(0, num_rotated, 2), *range(1, num_rotated, 2), *range(num_rotated, 8)]
    expected = np.empty_like(x)
    expected[..., order] = apply_rope(x[..., order], tables)
    found = apply_rope(jnp.asarray(x), tables, interleaved=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[..., num_rotated:], x[..., num_rotated:])
    # The gradient, which has a rule of its own, is that of the halves.
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    (theirs,) = jax.vjp(lambda x: apply_rope(x, tables), jnp.asarray(x[..., order]))[1](cotangent[..., order])
    (ours,) = jax.vjp(lambda x: apply_rope(x, tables, interleaved=True), jnp.asarray(x))[1](jnp.asarray(cotangent))
    np.testing.assert_allclose(ours[..., order], theirs, atol=1e-6)


def test_a_quarter_turn_by_hand() -> None:
    quarter = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    np.testing.assert_array_equal(apply_rope(jnp.array([[[[3.0, 4.0]]]]), quarter, interleaved=True)[0, 0, 0], [-4, 3])
