"""Preference losses against hand-derived values, a plain float64 version, and their properties."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.losses import LOSSES, preference_loss

BETA = 0.1


def arrays(seed: int, num_pairs: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    values = {f"{name}_logps": rng.normal(-20, 5, num_pairs).astype(np.float32) for name in names}
    return values | {
        "chosen_lengths": rng.integers(1, 20, num_pairs),
        "rejected_lengths": rng.integers(1, 20, num_pairs),
    }


def plain(loss_type: str, x: dict[str, np.ndarray], beta: float, smoothing: float) -> list[float]:
    """The formulas in float64, one pair at a time, with the math module."""

    def log_sigmoid(z: float) -> float:
        return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))

    losses = []
    for index in range(len(x["policy_chosen_logps"])):
        row = {name: float(values[index]) for name, values in x.items()}
        a = row["policy_chosen_logps"] - row["reference_chosen_logps"]
        b = row["policy_rejected_logps"] - row["reference_rejected_logps"]
        z = beta * (a - b)
        losses.append(
            {
                "sigmoid": -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z),
                "hinge": max(0.0, 1 - z),
                "ipo": (a / row["chosen_lengths"] - b / row["rejected_lengths"] - 1 / (2 * beta)) ** 2,
            }[loss_type]
        )
    return losses


@pytest.mark.smoke
@pytest.mark.parametrize(("loss_type", "smoothing"), [*((name, 0.0) for name in LOSSES), ("sigmoid", 0.2)])
def test_agrees_with_the_plain_version(loss_type: str, smoothing: float) -> None:
    x = arrays(1)
    result = preference_loss(**x, loss_type=loss_type, beta=BETA, label_smoothing=smoothing)
    np.testing.assert_allclose(result.losses, plain(loss_type, x, BETA, smoothing), rtol=2e-5)
    np.testing.assert_allclose(
        result.chosen_rewards, BETA * (x["policy_chosen_logps"] - x["reference_chosen_logps"]), rtol=1e-5
    )


@pytest.mark.parametrize(("loss_type", "expected"), [("sigmoid", 0.5130152523999526), ("hinge", 0.6), ("ipo", 12.25)])
def test_worked_example_of_the_docstring(loss_type: str, expected: float) -> None:
    a, b = jnp.array([3.0]), jnp.array([-1.0])
    result = preference_loss(
        a, b, 0 * a, 0 * b, loss_type=loss_type, chosen_lengths=jnp.array([3]), rejected_lengths=jnp.array([2])
    )
    assert result.losses[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_agrees_with_finite_differences_in_float64(loss_type: str) -> None:
    x = arrays(2)

    def total(chosen: np.ndarray) -> float:
        return sum(plain(loss_type, x | {"policy_chosen_logps": chosen}, BETA, 0.0))

    grad = jax.grad(
        lambda chosen: preference_loss(
            **(x | {"policy_chosen_logps": chosen}), loss_type=loss_type, beta=BETA
        ).losses.sum()
    )(x["policy_chosen_logps"])
    chosen = x["policy_chosen_logps"].astype(np.float64)
    for index, value in enumerate(grad):
        nudge = np.zeros_like(chosen)
        nudge[index] = 1e-5
        assert value == pytest.approx((total(chosen + nudge) - total(chosen - nudge)) / 2e-5, rel=1e-4, abs=1e-7)


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
@settings(max_examples=30, deadline=None)
def test_swapping_the_sides_mirrors_the_margin(seed: int, beta: float) -> None:
    x = arrays(seed)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    y = {name.replace(side, swap[side]): values for name, values in x.items() for side in swap if side in name}
    one, other = preference_loss(**x, beta=beta), preference_loss(**y, beta=beta)
    np.testing.assert_allclose(one.chosen_rewards, other.rejected_rewards, rtol=1e-6)
    # -ls(z) - (-ls(-z)) = -z
    margin = np.asarray(one.chosen_rewards - one.rejected_rewards)
    np.testing.assert_allclose(one.losses - other.losses, -margin, rtol=1e-3, atol=2e-5)


def test_policy_equal_to_reference_gives_ln_2() -> None:
    x = arrays(3)
    same = {name: x[name.replace("reference", "policy")] if "reference" in name else value for name, value in x.items()}
    np.testing.assert_allclose(preference_loss(**same).losses, math.log(2), rtol=1e-6)


def test_extreme_margins_stay_finite() -> None:
    chosen = jnp.array([1e4, -1e4])
    zero = jnp.zeros(2)
    value, grad = jax.value_and_grad(lambda c: preference_loss(c, zero, zero, zero, beta=1.0).losses.sum())(chosen)
    assert value == pytest.approx(1e4)
    np.testing.assert_allclose(grad, [0.0, -1.0])


def test_half_precision_inputs_are_computed_in_float32() -> None:
    x = {name: jnp.asarray(v, jnp.bfloat16) if "logps" in name else v for name, v in arrays(4).items()}
    assert preference_loss(**x).losses.dtype == jnp.float32


def test_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown loss_type 'sigmod'; the losses are: sigmoid, hinge, ipo"):
        preference_loss(**arrays(0), loss_type="sigmod")


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_refuses_smoothing(loss_type: str) -> None:
    with pytest.raises(ValueError, match=r"cannot honour label_smoothing=0.1; these can: sigmoid"):
        preference_loss(**arrays(0), loss_type=loss_type, label_smoothing=0.1)


def test_refuses_missing_reference_lengths_and_unequal_shapes() -> None:
    x = arrays(0)
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        preference_loss(x["policy_chosen_logps"], x["policy_rejected_logps"])
    with pytest.raises(ValueError, match="needs chosen_lengths and rejected_lengths"):
        preference_loss(**{k: v for k, v in x.items() if "lengths" not in k}, loss_type="ipo")
    with pytest.raises(ValueError, match="must have one shape"):
        preference_loss(**(x | {"reference_chosen_logps": x["reference_chosen_logps"][:3]}))
