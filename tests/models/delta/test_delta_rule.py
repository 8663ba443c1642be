"""The chunked delta rule equals the plain recurrence, token by token, with its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.attention import segment_starts
from jdpo.models.delta.delta_rule import DeltaInputs, delta_step, gated_delta_rule, unit_lower_inverse

N, G, M, K, V = 2, 2, 2, 4, 3
LENGTHS = np.array([[5, 9, 4, 0], [11, 1, 2, 6]])
NUM_PLACES = 21


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs_of(rng: np.random.Generator, length: int, **settings: Any) -> DeltaInputs:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    return DeltaInputs(
        query=unit(rng.normal(size=(N, length, G, K))),
        key=unit(rng.normal(size=(N, length, G, K))),
        value=rng.normal(size=(N, length, G, M, V)),
        log_decay=-rng.gamma(0.5, size=(N, length, G, M)),
        beta=rng.uniform(size=(N, length, G, M)),
    )._replace(**settings)


def recurrence(inputs: DeltaInputs, starts: np.ndarray) -> tuple[Any, Any]:
    """The rule as the paper states it (equation 10), one token after the other."""
    query, key, value, log_decay, beta = inputs
    state, outputs = jnp.zeros((N, G, M, K, V)), []
    for t in range(value.shape[1]):
        state = jnp.where((starts[:, t] == t)[:, None, None, None, None], 0, state)
        state = state * jnp.exp(log_decay[:, t])[..., None, None]
        predicted = jnp.einsum("ngmkv,ngk->ngmv", state, key[:, t])
        correction = beta[:, t][..., None] * (value[:, t] - predicted)
        state = state + jnp.einsum("ngk,ngmv->ngmkv", key[:, t], correction)
        outputs.append(jnp.einsum("ngmkv,ngk->ngmv", state, query[:, t]))
    return jnp.stack(outputs, 1), state


# 7 divides the rows, 8 leaves a rest, and 64 is longer than they are; sequences start within chunks.
@pytest.mark.parametrize(
    "chunk", [pytest.param(7, marks=pytest.mark.full), 8, pytest.param(64, marks=pytest.mark.full)]
)
def test_chunks_equal_the_recurrence(chunk: int) -> None:
    rng, starts = np.random.default_rng(0), segment_starts(LENGTHS, NUM_PLACES)
    inputs, weights = inputs_of(rng, NUM_PLACES), rng.normal(size=(N, NUM_PLACES, G, M, V))
    of_state = rng.normal(size=(N, G, M, K, V))

    def score(rule: Any) -> Any:
        def total(inputs: DeltaInputs) -> Any:
            outputs, state = rule(inputs)
            return (outputs * weights).sum() + (state * of_state).sum(), (outputs, state)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)

    expected = score(lambda inputs: recurrence(inputs, starts))
    found = score(lambda inputs: gated_delta_rule(inputs, jnp.asarray(starts), chunk=chunk))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.full
def test_steps_equal_chunks() -> None:
    inputs = inputs_of(np.random.default_rng(1), 6)
    expected, last = gated_delta_rule(inputs, jnp.zeros((N, 6), int), chunk=4)
    state = jnp.zeros((N, 1, G, M, K, V))
    for t in range(6):
        output, state = delta_step(state, DeltaInputs(*(x[:, t, None] for x in inputs)))
        np.testing.assert_allclose(output[:, 0], expected[:, t], atol=1e-12)
    np.testing.assert_allclose(state[:, 0], last, atol=1e-12)


@pytest.mark.full
def test_a_token_without_beta_and_decay_leaves_the_state_as_it_is() -> None:
    inputs = inputs_of(np.random.default_rng(2), 9)
    rest = DeltaInputs(*(x.copy() for x in inputs))
    rest.log_decay[:, 5:], rest.beta[:, 5:] = 0, 0
    starts = jnp.zeros((N, 9), int)
    _, expected = gated_delta_rule(DeltaInputs(*(x[:, :5] for x in inputs)), starts[:, :5])
    np.testing.assert_allclose(gated_delta_rule(rest, starts, chunk=4)[1], expected, atol=1e-12)


def test_strong_decay_and_equal_keys_stay_finite_and_exact_in_float32() -> None:
    """Equal keys with beta 1, as of a repeated token, are what a power series in place of the inverse fails on."""
    length = 128
    with jax.enable_x64(False):
        key = np.ones((N, length, G, K), np.float32) / K**0.5
        inputs = inputs_of(np.random.default_rng(3), length, key=key, query=key)
        starts = segment_starts(np.array([[70, 58], [128, 0]]), length)
        for log_decay in (0.0, -1e-3, -80.0):
            hard = inputs._replace(log_decay=np.full(inputs.beta.shape, log_decay), beta=np.ones(inputs.beta.shape))
            hard = DeltaInputs(*(np.asarray(x, np.float32) for x in hard))
            grads = jax.jit(jax.grad(lambda x: jnp.sum(gated_delta_rule(x, starts)[0])))(hard)
            assert all(np.isfinite(leaf).all() for leaf in grads)
            # The state then predicts exactly the last value for this key.
            np.testing.assert_allclose(jax.jit(gated_delta_rule)(hard, starts)[0], hard.value, atol=2e-5)


@pytest.mark.full
def test_bfloat16_is_as_exact_as_its_operands() -> None:
    """Decays, the triangular system and the state are in float32, so that errors do not grow along a row."""
    length, starts = 512, jnp.zeros((N, 512), int)
    inputs = inputs_of(np.random.default_rng(5), length)
    inputs = inputs._replace(log_decay=inputs.log_decay / 50)  # a long memory
    names = ("query", "key", "value")
    narrow = inputs._replace(**{name: jnp.asarray(getattr(inputs, name), jnp.bfloat16) for name in names})
    narrow = narrow._replace(log_decay=np.float32(inputs.log_decay), beta=np.float32(inputs.beta))
    exact = jax.jit(gated_delta_rule)(DeltaInputs(*(jnp.asarray(x, jnp.float64) for x in narrow)), starts)[0]
    found, state = jax.jit(gated_delta_rule)(narrow, starts)
    assert (found.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    errors = np.sqrt(np.mean((found - exact) ** 2, axis=(0, 2, 3, 4))) / np.sqrt(np.mean(exact**2))
    assert errors.mean() < 0.01
    assert errors[-128:].mean() < 1.5 * errors[:128].mean()


@pytest.mark.full
def test_the_inverse_of_triangular_systems_and_its_gradient() -> None:
    rng = np.random.default_rng(4)
    lower, weights = np.tril(rng.normal(size=(3, 13, 13)), -1), rng.normal(size=(3, 13, 13))
    expected = np.linalg.inv(np.eye(13) + lower)
    np.testing.assert_allclose(unit_lower_inverse(lower), expected, rtol=1e-9, atol=1e-9)
    grads = jax.grad(lambda x: jnp.sum(unit_lower_inverse(x) * weights))(lower)
    of_general = jax.grad(lambda x: jnp.sum(jnp.linalg.inv(jnp.eye(13) + x) * weights))(lower)
    np.testing.assert_allclose(np.tril(grads, -1), np.tril(of_general, -1), rtol=1e-7)
