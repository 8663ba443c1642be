"""Checks that end a run: a start that is silently wrong, NaN or Inf, and gradients that stay 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.losses.pair_losses import loss_inputs, loss_terms, sum_of_terms
from jdpo.losses.settings import LossSettings
from jdpo.words import listed

START_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of policy and reference log-prob per token, by compute dtype, where both are one model."""

MOST_NAMED = 8

DEAD_WARNING, DEAD_ERROR = 3, 20
"""Consecutive logged steps with a gradient of exactly 0 after which a run warns, and after which it stops."""


def check_start(
    rows: Mapping[str, np.ndarray],
    loss: LossSettings,
    *,
    lengths: np.ndarray,
    compute_dtype: str,
    reference_is_start: bool,
) -> str:
    """Compares policy and reference on the first batch, before the first update.

    Args:
      rows: per-row values [b] of the first step.
      loss: losses with a reference; rewards / beta are policy minus reference log-probs.
      lengths: int [b, 2], completion tokens of chosen and rejected.
      compute_dtype: determines the tolerance.
      reference_is_start: True if both are meant to be one model.

    Returns:
      a line to log.

    Raises:
      ValueError: both are meant to be one model and are not.
    """
    rewards = np.stack([rows["rewards/chosen"], rows["rewards/rejected"]], axis=-1)
    # Rewards are beta times the difference of summed log-probs.
    distance = np.abs(rewards / loss.beta) / np.maximum(lengths, 1)
    worst, mean = float(distance.max()), float(np.mean(rows["loss"]))
    if not reference_is_start:
        return f"start: policy and reference differ by {distance.mean():.3g} nats per token ({worst:.3g} at most)"
    tolerance = START_TOLERANCE[compute_dtype]
    if not worst <= tolerance:  # NaN too
        raise ValueError(
            f"the reference is the policy's own start, yet their log-probs differ by {worst:.3g} nats per token before "
            f"the first update (at most {tolerance} is rounding in {compute_dtype}): the reference was not loaded as "
            "the policy was; nothing was trained"
        )
    expected = start_loss(loss)
    if expected is None:
        return f"start: policy equals reference (largest difference {worst:.1e} nats per token), loss {mean:.4f}"
    # As far as rounding within the tolerance can move this loss, which may be steep at 0.
    slack = _start_slack(loss, tolerance * lengths.max(0))
    if not abs(mean - expected) <= slack:
        named = "ln 2 = " if math.isclose(expected, math.log(2), rel_tol=1e-6) else ""
        raise ValueError(
            f"the loss before the first update is {mean:.6f}, not {named}{expected:.6f} as of {' + '.join(loss.terms)} "
            "where policy and reference are equal; nothing was trained"
        )
    return (
        f"start: policy equals reference (largest difference {worst:.1e} nats per token), loss {mean:.4f} "
        f"({expected:.4f} expected)"
    )


def start_loss(loss: LossSettings) -> float | None:
    """Returns the loss where policy and reference are equal, or None if it depends on more: NLL, WPO, scores."""
    if (
        loss.token_mean
        or loss.use_weighting
        or loss.needs_scores
        or not all("reference" in spec.needs for spec in loss.specs)
    ):
        return None
    return _loss_at(loss, np.zeros((1, 2)))


def _loss_at(loss: LossSettings, logratios: Any) -> float:
    zeros: Any = np.zeros_like(logratios)  # numpy's float64: the differences are exact whatever jax computes in
    lengths: Any = np.ones((1, 2))
    inputs = loss_inputs(loss, logratios, zeros, lengths, mean_chosen_tokens=None)
    return float(sum_of_terms(loss, loss_terms(loss, inputs))[0])


def _start_slack(loss: LossSettings, most: np.ndarray) -> float:
    """Largest change of the loss by rounding of the log-ratios by up to `most` [2], and by its own rounding."""
    start = _loss_at(loss, np.zeros((1, 2)))
    # Taken at the corners of the range of rounding errors, where losses of one or two log-ratios change the most.
    corners = [np.array([[x * most[0], y * most[1]]]) for x in (-1, 1) for y in (-1, 1)]
    return 1e-6 * max(1.0, abs(start)) + max(abs(_loss_at(loss, corner) - start) for corner in corners)


def check_base(saved: Mapping[str, str] | None, now: Mapping[str, str] | None, where: Path) -> None:
    """Refuses adapters on another base than they were trained on.

    Args:
      saved: the base of the checkpoint, {model, digest, dtype}, or None where it holds all weights.
      now: the base of this run.
      where: the checkpoint.

    Raises:
      ValueError: naming both.
    """
    identities = [None if base is None else (base["digest"], base["dtype"]) for base in (saved, now)]
    if identities[0] != identities[1]:
        raise ValueError(
            f"the checkpoint in {where} holds {_on_base(saved)}, and this run trains {_on_base(now)}: adapters fit "
            "only the base that they were trained on. Give that base, or choose another output_dir"
        )


def _on_base(base: Mapping[str, str] | None) -> str:
    if base is None:
        return "all weights"
    return f"adapters on {base['model']} in {base['dtype']} (digest {base['digest'][:12]})"


def check_finite(
    step: int,
    loss: float,
    grad_norm: float,
    row_losses: np.ndarray,
    origins: Sequence[str],
    last_saved: int | None,
    weights_finite: bool = True,
) -> None:
    """Stops a run whose loss, gradients or weights are NaN or Inf.

    Args:
      step: the update that was computed.
      row_losses: [b], in the order of `origins`.
      origins: where each row of the step came from.
      last_saved: the newest checkpoint, or None.
      weights_finite: False if the updated weights contain NaN or Inf.

    Raises:
      FloatingPointError: naming the step and its rows.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm) and weights_finite:
        return
    bad = [origin for origin, value in zip(origins, row_losses, strict=True) if not math.isfinite(value)]
    named = bad or list(origins)
    rows = listed(named, MOST_NAMED)
    what = (
        f"rows with a non-finite loss: {rows}" if bad else f"every row's loss is finite; the rows of the step: {rows}"
    )
    kept = f"the checkpoint of step {last_saved} is intact" if last_saved is not None else "no checkpoint was saved yet"
    raise FloatingPointError(
        f"step {step} gave loss {loss} and gradient norm {grad_norm}"
        f"{'' if weights_finite else ', and the updated weights contain NaN or Inf'}, so training stops; "
        f"{what}; {kept}. Look at these rows; then start in a new output_dir with a lower learning_rate, or with "
        "compute_dtype float32"
    )


def check_evaluation(step: int, metrics: Mapping[str, float]) -> None:
    """Stops a run whose evaluation gave NaN or Inf.

    Raises:
      FloatingPointError: naming the metrics.
    """
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the evaluation after step {step} gave {', '.join(bad)}, so training stops; look at the evaluation rows, "
            "or start in a new output_dir with a lower learning_rate, or with compute_dtype float32"
        )


class GradientWatch:
    """Detects a run that no longer learns: its gradient norm is exactly 0, which rounding alone never gives."""

    def __init__(self, loss: LossSettings | None, *, learning_rate: float, compute_dtype: str) -> None:
        """
        Args:
          loss: None for supervised fine-tuning.
          learning_rate: the peak.
        """
        self._flat = loss is not None and set(loss.terms) == {"hinge"}
        self._settings = f"learning_rate {learning_rate:g}, compute_dtype {compute_dtype}"
        self._first, self._num_dead = 0, 0

    def see(self, step: int, averages: Mapping[str, float], last_saved: int | None) -> str | None:
        """Looks at a line of the log.

        Args:
          step: the last step of the line.
          averages: over the steps since the line before.
          last_saved: the newest checkpoint, or None.

        Returns:
          a warning, once per stretch of such steps.

        Raises:
          FloatingPointError: the gradient has been 0 for too long, unless every margin of hinge is met.
        """
        if averages["grad_norm"] != 0:
            self._num_dead = 0
            return None
        self._num_dead += 1
        if self._num_dead == 1:
            self._first = step
        # Hinge is flat where its margin is met: no fault, and more steps change nothing.
        met = self._flat and averages["loss"] == 0
        if self._num_dead >= DEAD_ERROR and not met:
            saved = "" if last_saved is None else f" The newest checkpoint is of step {last_saved}."
            raise FloatingPointError(
                f"step {step}: {self._describe()}, so training stops. {self._causes(met)}.{saved} "
                "Start in a new output_dir with the cause removed"
            )
        if self._num_dead == DEAD_WARNING:
            return f"warning: step {step}: {self._describe()}, so nothing is learnt. {self._causes(met)}"
        return None

    def _describe(self) -> str:
        num = self._num_dead
        which = "the last logged step" if num == 1 else f"the last {num} logged steps (from {self._first} on)"
        return f"the gradient norm is exactly 0 in {which}"

    def _causes(self, met: bool) -> str:
        if met:
            return "The loss is 0 too: every pair's margin of hinge is met, and more steps change nothing"
        return (
            f"Likely causes: a learning rate so high that the loss has become flat, or a model whose weights are all 0 "
            f"or too large for its dtype ({self._settings})"
        )
