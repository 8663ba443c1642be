"""Stochastic rounding: exact in the mean, without effect on exact values, equal on every mesh; and its benefit."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jdpo.config import MeshConfig
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import fetch
from jdpo.training.step.rounding import apply_updates, stochastic_round, store, wide

BF16 = ml_dtypes.bfloat16
ALL_BITS = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.05, -3.3e-7, 7e4, 1.999, 1e-39, -2e-40, 3.3e38, 2**-126])
def test_the_mean_over_all_random_bits_is_the_value(value: float) -> None:
    exact = np.float32(value)
    with np.errstate(all="raise"):
        rounded = np.asarray(stochastic_round(jnp.full(2**16, exact), ALL_BITS)).astype(np.float64)
    assert rounded.mean() == pytest.approx(float(exact), rel=1e-12, abs=0)
    neighbours = np.unique(rounded)
    assert len(neighbours) == 1 or np.diff(neighbours.astype(BF16).view(np.uint16).astype(int)) in (1, -1)


def test_bfloat16_values_stay_put() -> None:
    every = ALL_BITS.view(BF16)  # includes subnormal numbers, both zeros, infinities and NaN
    for bits in (0, 1, 2**15, 2**16 - 1):
        rounded = np.asarray(jax.jit(stochastic_round)(every.astype(np.float32), np.full(2**16, bits, np.uint16)))
        nan = np.isnan(every.astype(np.float32))
        np.testing.assert_array_equal(rounded.view(np.uint16)[~nan], ALL_BITS[~nan])
        assert np.isnan(rounded[nan].astype(np.float32)).all()


def test_nan_stays_nan_and_an_overflow_is_infinite() -> None:
    values = np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x7F800000], np.uint32).view(np.float32)
    found = np.asarray(stochastic_round(jnp.asarray(values), np.full(4, 2**16 - 1, np.uint16))).astype(np.float32)
    assert np.isnan(found[:2]).all()
    assert np.isposinf(found[2:]).all()


def test_few_random_bits_are_as_good_as_all_bits() -> None:
    # A quarter of the way between neighbours: 1 of 4 goes up. The standard error of 100,000 draws is 0.0014.
    between = jnp.full((400, 250), 1 + 2**-9)
    first, second = store([between, between], [between.astype(jnp.bfloat16)] * 2, jax.random.key(0))
    up = np.stack([np.asarray(leaf) > 1 for leaf in (first, second)])
    assert up.mean((1, 2)) == pytest.approx([0.25, 0.25], abs=0.006)
    assert (up[0] & up[1]).mean() == pytest.approx(1 / 16, abs=0.004), "the two halves of a draw go their own ways"


def tree(seed: int, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    values = {
        "a": {"kernel": rng.normal(size=(64, 24))},
        "b": {"kernel": rng.normal(size=(8, 64)), "scale": np.ones(8)},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(scale * leaf, jnp.float32), values)


def narrow(values: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), values)


def test_no_mesh_and_no_other_leaf_changes_the_rounding() -> None:
    params, updates, key = narrow(tree(0)), tree(1, 1e-3), jax.random.key(3)
    expected = fetch(jax.jit(apply_updates)(params, updates, key))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    split = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, jax.P(("fsdp", "tensor"))), params)
    step = jax.jit(apply_updates, out_shardings=split)
    found = step(jax.device_put(params, split), jax.device_put(updates, split), key)
    jax.tree.map(np.testing.assert_array_equal, fetch(found), expected)
    text = step.lower(jax.device_put(params, split), jax.device_put(updates, split), key).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text), "each device draws its own bits"
    alone = apply_updates({"b": params["b"]}, {"b": updates["b"]}, key)
    jax.tree.map(np.testing.assert_array_equal, fetch(alone["b"]), expected["b"])
    other = apply_updates(params, updates, jax.random.key(4))
    assert (np.asarray(other["a"]["kernel"]) != expected["a"]["kernel"]).any()


def test_float32_and_float64_weights_are_updated_as_optax_does() -> None:
    params, updates = tree(0), tree(1, 1e-3)
    jax.tree.map(
        np.testing.assert_array_equal,
        apply_updates(params, updates, jax.random.key(0)),
        optax.apply_updates(params, updates),
    )
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, updates))
        found = apply_updates(*exact, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float64")}
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.add, *exact))


def test_small_updates_add_up_where_rounding_to_nearest_loses_all_of_them() -> None:
    """Makes 1,000 updates of 1e-6 on weights of 0.05, whose neighbours are 2.4e-4 away."""
    start = narrow({"kernel": jnp.full((64, 64), 0.05)})
    update = {"kernel": jnp.full((64, 64), 1e-6)}

    @jax.jit
    def after(params: Any, key: Any) -> tuple[Any, Any]:
        def step(carry: Any, key: Any) -> tuple[Any, None]:
            naive, ours = carry
            return (optax.apply_updates(naive, update), apply_updates(ours, update, key)), None

        return jax.lax.scan(step, (params, params), jax.random.split(key, 1000))[0]

    naive, ours = (np.asarray(wide(params)["kernel"], np.float64) for params in after(start, jax.random.key(0)))
    first = float(start["kernel"][0, 0])
    assert (naive == first).all()
    # Weights move in steps of 2.4e-4: after 1,000 updates they deviate by 5e-4 from 1e-3, their mean by 8e-6.
    assert (ours - first).mean() == pytest.approx(1e-3, rel=0.03)
    assert 3e-4 < (ours - first).std() < 7e-4
