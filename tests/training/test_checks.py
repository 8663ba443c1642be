"""What a run refuses: a reference that is not the policy, and numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jdpo.training.checks import check_finite, check_start

LENGTHS = np.array([[4, 2], [8, 5]])
BETA = 0.1


def rows(logratio: float = 0.0, loss: float = math.log(2)) -> dict[str, np.ndarray]:
    """Two pairs, the second pair's chosen side off by `logratio` nats in all (8 tokens)."""
    return {
        "loss": np.array([math.log(2), loss]),
        "rewards/chosen": BETA * np.array([0.0, logratio]),
        "rewards/rejected": np.zeros(2),
    }


def check(values: dict[str, np.ndarray], **changes: Any) -> str:
    settings = {"compute_dtype": "float32", "reference_is_start": True, "loss_is_sigmoid": True} | changes
    return check_start(values, beta=BETA, lengths=LENGTHS, **settings)


def test_equal_models_pass_and_say_so() -> None:
    assert check(rows()) == "start: policy equals reference (largest difference 0.0e+00 nats a token), loss 0.6931"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_bar_is_per_token_and_by_dtype(dtype: str, tolerance: float) -> None:
    check(rows(0.9 * tolerance * 8), compute_dtype=dtype)
    with pytest.raises(ValueError, match=rf"differ by {1.1 * tolerance:.3g} nats a token before the first update"):
        check(rows(1.1 * tolerance * 8), compute_dtype=dtype)


def test_a_wrong_loss_of_equal_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is 0\.943147, not ln 2 = 0\.693147; nothing was trained"):
        check(rows(loss=math.log(2) + 0.5))
    check(rows(loss=math.log(2) + 0.5), loss_is_sigmoid=False)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="differ by nan nats a token"):
        check(rows(math.nan))


def test_another_reference_is_reported_only() -> None:
    assert check(rows(4.0), reference_is_start=False) == (
        "start: policy and reference differ by 0.125 nats a token (0.5 at most)"
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
