"""What a run refuses: a start that is silently wrong, and numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

START_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of policy and reference log-prob a token, by compute dtype, where both are one model."""

MOST_NAMED = 8


def check_start(
    rows: Mapping[str, np.ndarray],
    *,
    beta: float,
    lengths: np.ndarray,
    compute_dtype: str,
    reference_is_start: bool,
    loss_is_sigmoid: bool,
) -> str:
    """Compares policy and reference on the first batch, before their first difference is trained in.

    Args:
      rows: per-row values [b] of the first step.
      beta: rewards / beta are policy minus reference log-probs.
      lengths: int [b, 2], completion tokens of chosen and rejected.
      compute_dtype: decides the tolerance.
      reference_is_start: whether the two are meant to be one model.
      loss_is_sigmoid: whether the loss of equal models is ln 2.

    Returns:
      a line for the person who started the run.

    Raises:
      ValueError: the two are meant to be one model and are not.
    """
    rewards = np.stack([rows["rewards/chosen"], rows["rewards/rejected"]], axis=-1)
    distance = np.abs(rewards / beta) / np.maximum(lengths, 1)
    worst, loss = float(distance.max()), float(np.mean(rows["loss"]))
    if not reference_is_start:
        return f"start: policy and reference differ by {distance.mean():.3g} nats a token ({worst:.3g} at most)"
    tolerance = START_TOLERANCE[compute_dtype]
    if not worst <= tolerance:  # NaN too
        raise ValueError(
            f"the reference is the policy's own start, yet their log-probs differ by {worst:.3g} nats a token before "
            f"the first update (at most {tolerance} is rounding in {compute_dtype}): the reference was not loaded as "
            "the policy was; nothing was trained"
        )
    # A loss is off by at most beta x the difference of summed log-probs.
    slack = 1e-6 + beta * float(np.max(tolerance * lengths.sum(-1)))
    if loss_is_sigmoid and not abs(loss - math.log(2)) <= slack:
        raise ValueError(
            f"the loss before the first update is {loss:.6f}, not ln 2 = {math.log(2):.6f}; nothing was trained"
        )
    return f"start: policy equals reference (largest difference {worst:.1e} nats a token), loss {loss:.4f}"


def check_finite(
    step: int,
    loss: float,
    grad_norm: float,
    row_losses: np.ndarray,
    origins: Sequence[str],
    last_saved: int | None,
    weights_finite: bool = True,
) -> None:
    """Stops a run whose numbers are none.

    Args:
      step: the update that was computed.
      row_losses: [b], in the order of `origins`.
      origins: where each row of the step came from.
      last_saved: the newest checkpoint, or None.
      weights_finite: whether the updated weights are numbers.

    Raises:
      FloatingPointError: naming the step and its rows.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm) and weights_finite:
        return
    bad = [origin for origin, value in zip(origins, row_losses, strict=True) if not math.isfinite(value)]
    named = bad or list(origins)
    rows = ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else "")
    what = (
        f"rows with a non-finite loss: {rows}" if bad else f"every row's loss is finite; the rows of the step: {rows}"
    )
    kept = f"the checkpoint of step {last_saved} is intact" if last_saved is not None else "no checkpoint was saved yet"
    raise FloatingPointError(
        f"step {step} gave loss {loss} and gradient norm {grad_norm}"
        f"{'' if weights_finite else ', and an update after which the weights are no numbers'}, so training stops; "
        f"{what}; {kept}. Look at these rows; then start in a new output_dir with a lower learning_rate, or with "
        "compute_dtype float32"
    )


def check_evaluation(step: int, metrics: Mapping[str, float]) -> None:
    """Stops a run whose evaluation gave something that is no number.

    Raises:
      FloatingPointError: naming the metrics.
    """
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the evaluation after step {step} gave {', '.join(bad)}, so training stops; look at the evaluation rows, "
            "or start in a new output_dir with a lower learning_rate, or with compute_dtype float32"
        )
