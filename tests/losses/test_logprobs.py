"""Token and sequence log-probs against a plain float64 version."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import sequence_logps, token_logps
from jdpo.losses.logprobs import shifted_token_logps, token_log_sum_sq


def plain_token_logps(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_token_logps_of_any_float_dtype_are_float32(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (2, 5, 11)), dtype)
    targets = rng.integers(0, 11, (2, 5))
    found = token_logps(logits, targets)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain_token_logps(np.asarray(logits, np.float64), targets), rtol=1e-5)


def test_token_logps_gradient_is_one_hot_minus_softmax() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (4, 7)).astype(np.float32)
    targets, weights = rng.integers(0, 7, 4), rng.normal(0, 1, 4).astype(np.float32)
    grad = jax.grad(lambda x: (token_logps(x, targets) * weights).sum())(logits)
    softmax = np.exp(logits.astype(np.float64))
    softmax /= softmax.sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, weights[:, None] * (np.eye(7)[targets] - softmax), atol=1e-6)


def test_the_sum_of_squares_is_that_of_the_softmax() -> None:
    logits = np.random.default_rng(3).normal(1, 3, (2, 5, 11))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = token_log_sum_sq(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, np.log(np.square(probs).sum(-1)), rtol=1e-4, atol=1e-5)


def test_the_last_prompt_position_predicts_the_first_completion_token() -> None:
    # P0 P1 C0 C1 pad: position 1 predicts C0, position 2 predicts C1.
    tokens = jnp.array([[0, 1, 2, 3, 0]])
    completion = jnp.array([[False, False, True, True, False]])
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, (1, 5, 4)), jnp.float32)
    logps = sequence_logps(*shifted_token_logps(logits, tokens, completion))
    expected = plain_token_logps(np.asarray(logits[0, 1:3]), np.array([2, 3])).sum()
    assert logps[0] == pytest.approx(expected, rel=1e-5)


def test_what_is_masked_never_matters_not_even_nan() -> None:
    mask = jnp.array([[True, False, True]])
    clean = jnp.array([[-1.0, -2.0, -3.0]])
    dirty = clean.at[0, 1].set(jnp.nan)
    value, grad = jax.value_and_grad(lambda x: sequence_logps(x, mask).sum())(dirty)
    assert value == -4.0
    np.testing.assert_array_equal(grad, [[1.0, 0.0, 1.0]])


def test_mean_divides_by_the_number_of_tokens_and_survives_none() -> None:
    logps = jnp.array([[-1.0, -3.0], [-5.0, -7.0]])
    mask = jnp.array([[True, True], [False, False]])
    np.testing.assert_array_equal(sequence_logps(logps, mask, reduction="mean"), [-2.0, 0.0])


def test_errors_name_shapes_and_choices() -> None:
    with pytest.raises(ValueError, match=r"expected targets of shape \(2, 3\)"):
        token_logps(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), int))
    with pytest.raises(ValueError, match="must have the same shape"):
        sequence_logps(jnp.zeros((2, 3)), jnp.zeros((2, 4), bool))
    with pytest.raises(ValueError, match="'sum' or 'mean', found 'max'"):
        sequence_logps(jnp.zeros((2, 3)), jnp.zeros((2, 3), bool), reduction="max")  # type: ignore[arg-type]
