"""The token table's gradient where one token occurs thousands of times."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.lookup import lookup

TOKENS = np.where(np.arange(4096).reshape(64, 64) % 2, 0, np.arange(4096).reshape(64, 64) % 31 + 1)


def gradient(dtype: str, take: Any) -> np.ndarray:
    cotangent = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (64, 64, 8)), jnp.bfloat16)
    _, pull_back = jax.vjp(lambda table: take(table, TOKENS).astype(jnp.bfloat16), jnp.ones((32, 8), dtype))
    (found,) = jax.jit(pull_back)(cotangent)
    assert found.dtype == dtype
    return np.asarray(found, np.float64)


def test_a_narrow_table_gets_the_sum_of_a_wide_one() -> None:
    exact = gradient("float32", lookup)
    np.testing.assert_array_equal(exact, gradient("float32", lambda table, tokens: table[tokens]))
    np.testing.assert_allclose(gradient("bfloat16", lookup), exact, rtol=2**-8, atol=1e-3)
    lost = gradient("bfloat16", lambda table, tokens: table[tokens])
    assert np.abs(lost[0] / exact[0] - 1).min() > 0.05, "what plain indexing loses of the token in every other place"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_those_of_the_table(dtype: str) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), dtype)
    found = lookup(table, TOKENS)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(table, np.float32)[TOKENS])
