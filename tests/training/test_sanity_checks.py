"""Sanity checks of a run: a reference that should equal the policy, NaN and Inf, and runs without gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jdpo.losses.settings import LossSettings, loss_settings
from jdpo.training.sanity_checks import DEAD_ERROR, DEAD_WARNING, GradientWatch, check_finite, check_start, start_loss

LENGTHS = np.array([[4, 2], [8, 5]])
BETA = 0.1


def rows(logratio: float = 0.0, loss: float = math.log(2)) -> dict[str, np.ndarray]:
    """Returns two pairs; the second pair's chosen side (8 tokens) is off by `logratio` nats in total."""
    return {
        "loss": np.array([math.log(2), loss]),
        "rewards/chosen": BETA * np.array([0.0, logratio]),
        "rewards/rejected": np.zeros(2),
    }


def check(values: dict[str, np.ndarray], loss: LossSettings | None = None, **changes: Any) -> str:
    settings = {"compute_dtype": "float32", "reference_is_start": True} | changes
    return check_start(values, loss or loss_settings(beta=BETA)[0], lengths=LENGTHS, **settings)


def test_equal_models_pass_with_a_line() -> None:
    line = check(rows())
    assert line.endswith("equals reference (largest difference 0.0e+00 nats per token), loss 0.6931 (0.6931 expected)")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_bar_is_per_token_and_by_dtype(dtype: str, tolerance: float) -> None:
    check(rows(0.9 * tolerance * 8), compute_dtype=dtype)
    with pytest.raises(ValueError, match=rf"differ by {1.1 * tolerance:.3g} nats per token before the first update"):
        check(rows(1.1 * tolerance * 8), compute_dtype=dtype)


def test_a_wrong_loss_of_equal_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is 0\.943147, not ln 2 = 0\.693147 as of sigmoid where"):
        check(rows(loss=math.log(2) + 0.5))
    with pytest.raises(ValueError, match=r"not 25\.000000 as of ipo where policy and reference are equal"):
        check(rows(), loss_settings("ipo", beta=BETA)[0])
    assert check(rows(loss=3.0), loss_settings(("sigmoid", "sft"), beta=BETA)[0]).endswith("loss 1.8466")


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        ("sigmoid", {"label_smoothing": 0.3}, math.log(2)),
        ("robust", {"label_smoothing": 0.3}, math.log(2)),
        ("hinge", {}, 1.0),
        ("ipo", {"beta": 0.2}, 6.25),
        ("ipo_sum", {"beta": 0.2}, 6.25),
        ("exo_pair", {"label_smoothing": 0.1}, math.log(0.5) - (math.log(0.9) + math.log(0.1)) / 2),
        ("nca_pair", {}, 2 * math.log(2)),
        ("bco_pair", {}, 2 * math.log(2)),
        ("bco_pair", {"bco_delta": 0.5}, 2 * math.log(2) + 2 * math.log(math.cosh(0.25))),
        ("sppo_hard", {"beta": 0.2}, 12.5),
        ("aot", {}, math.log(2)),
        ("aot_unpaired", {}, math.log(2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("discopop", {}, (math.log(2) + 1) / 2),
        ("sigmoid_norm", {"f_divergence_type": "js_divergence"}, math.log(2)),
        (("sigmoid", "hinge"), {"loss_weights": (0.5, 2.0)}, math.log(2) / 2 + 2),
        ("simpo", {}, None),
        (("sigmoid", "sft"), {}, None),
        ("sigmoid", {"rpo_alpha": 1.0}, None),
        ("sigmoid", {"use_weighting": True}, None),
    ],
    ids=str,
)
def test_loss_of_equal_models(loss_type: str, options: dict[str, Any], expected: float | None) -> None:
    found = start_loss(loss_settings(loss_type, **options)[0])
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-6))


def test_nan_and_inf_are_refused() -> None:
    with pytest.raises(ValueError, match="differ by nan nats per token"):
        check(rows(math.nan))


def test_another_reference_is_reported_only() -> None:
    assert check(rows(4.0), reference_is_start=False) == (
        "start: policy and reference differ by 0.125 nats per token (0.5 at most)"
    )


def test_finite_numbers_pass() -> None:
    check_finite(3, 0.5, 1.0, np.zeros(2), ["a:1", "a:2"], None)


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (0.5, math.inf)])
def test_step_rows_and_way_out_are_named(loss: float, grad_norm: float) -> None:
    with pytest.raises(FloatingPointError) as error:
        check_finite(7, loss, grad_norm, np.array([0.5, math.nan]), ["a.jsonl:1", "a.jsonl:2"], 5)
    message = str(error.value)
    assert message.startswith(f"step 7 gave loss {loss} and gradient norm {grad_norm}")
    assert "rows with a non-finite loss: a.jsonl:2;" in message
    assert "the checkpoint of step 5 is intact" in message
    assert "lower learning_rate" in message


def test_a_finite_loss_names_all_rows_up_to_eight() -> None:
    with pytest.raises(FloatingPointError, match=r"the rows of the step: a:0, .*a:7 and 4 more; no checkpoint"):
        check_finite(1, 0.5, math.nan, np.zeros(12), [f"a:{index}" for index in range(12)], None)


def seen(*norms: float, loss: float = 0.7, loss_type: str = "sigmoid", watch: GradientWatch | None = None) -> list[str]:
    """Returns what is logged about steps with these gradient norms."""
    settings = loss_settings(loss_type)[0]
    watch = watch or GradientWatch(settings, learning_rate=1e6, compute_dtype="float32")
    warnings = [watch.see(step, {"grad_norm": norm, "loss": loss}, 5) for step, norm in enumerate(norms, start=1)]
    return [line for line in warnings if line is not None]


def test_a_gradient_of_exactly_zero_is_warned_of_once() -> None:
    (warning,) = seen(1.0, *[0.0] * (DEAD_WARNING + 2))
    assert warning.startswith("warning: step 4: the gradient norm is exactly 0 in the last 3 logged steps (from 2 on)")
    assert "learning_rate 1e+06" in warning


@pytest.mark.parametrize("norms", [(1.0, 0.0, 0.0), (0.0, 0.0, 1e-30, 0.0, 0.0), (math.nan,) * 5, (1e-45,) * 30, ()])
def test_a_small_gradient_or_a_few_zeros_do_not_stop_a_run(norms: tuple[float, ...]) -> None:
    assert seen(*norms) == []


def test_a_run_without_gradients_is_stopped() -> None:
    seen(*[0.0] * (DEAD_ERROR - 1))
    with pytest.raises(FloatingPointError, match=r"step 20: .* exactly 0 in the last 20"):
        seen(*[0.0] * DEAD_ERROR)
    with pytest.raises(FloatingPointError, match="so training stops"):
        seen(*[0.0] * DEAD_ERROR, loss_type="hinge", loss=1.0)


def test_hinge_may_end_with_every_margin_met() -> None:
    (warning,) = seen(*[0.0] * (DEAD_ERROR + 5), loss=0.0, loss_type="hinge")
    assert "every pair's margin of hinge is met" in warning
