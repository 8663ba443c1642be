"""Preference losses: one pure function each on [b] arrays, and the catalogue of them by name.

Notation of the formulas: a, b policy minus reference summed log-prob of chosen, rejected; D = a - b;
n_w, n_l completion lengths in tokens; e label smoothing; ls log-sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any


class PreferenceLoss(NamedTuple):
    """What a preference loss gives for each pair: float32 [b] each."""

    losses: Array
    chosen_rewards: Array
    rejected_rewards: Array


class LossInputs(NamedTuple):
    """What every loss may read: [b] arrays and scalars."""

    chosen_logratios: Array  # a
    rejected_logratios: Array  # b
    chosen_lengths: Array | None  # n_w
    rejected_lengths: Array | None  # n_l
    beta: Array | float
    label_smoothing: Array | float


class LossSpec(NamedTuple):
    """One entry of the catalogue.

    Attributes:
      function: LossInputs -> float [b].
      needs_reference: whether reference log-probs are read.
      needs_lengths: whether completion lengths are read.
      options: names of the options that it honours, beside beta.
      source: paper and arXiv number.
    """

    function: Callable[[LossInputs], Array]
    needs_reference: bool
    needs_lengths: bool
    options: frozenset[str]
    source: str


def sigmoid_loss(x: LossInputs) -> Array:
    """-(1-e) ls(beta D) - e ls(-beta D): DPO, and cDPO where e > 0.

    At beta = 0.1, a = 3, b = -1: D = 4, -ls(0.4) = 0.513015.
    """
    margin = x.beta * (x.chosen_logratios - x.rejected_logratios)
    return -(1 - x.label_smoothing) * jax.nn.log_sigmoid(margin) - x.label_smoothing * jax.nn.log_sigmoid(-margin)


def hinge_loss(x: LossInputs) -> Array:
    """max(0, 1 - beta D). At beta = 0.1, D = 4: 0.6."""
    return jax.nn.relu(1 - x.beta * (x.chosen_logratios - x.rejected_logratios))


def ipo_loss(x: LossInputs) -> Array:
    """(a/n_w - b/n_l - 1/(2 beta))^2, log-ratios averaged over tokens as its authors agreed with TRL.

    At beta = 0.1, a = 3, n_w = 3, b = -1, n_l = 2: (1 + 0.5 - 5)^2 = 12.25.
    """
    chosen = x.chosen_logratios / jnp.maximum(x.chosen_lengths, 1)
    rejected = x.rejected_logratios / jnp.maximum(x.rejected_lengths, 1)
    return jnp.square(chosen - rejected - 1 / (2 * x.beta))


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        sigmoid_loss,
        True,
        False,
        frozenset({"label_smoothing"}),
        "DPO, arXiv 2305.18290, eq. 7; cDPO with e > 0",
    ),
    "hinge": LossSpec(hinge_loss, True, False, frozenset(), "SLiC/RSO, arXiv 2309.06657"),
    "ipo": LossSpec(ipo_loss, True, True, frozenset(), "IPO, arXiv 2310.12036, eq. 17"),
}
"""Every preference loss by name."""


def check_loss(loss_type: str, *, label_smoothing: float = 0.0) -> LossSpec:
    """The catalogue's entry for a name, after checking that it honours the options.

    Raises:
      ValueError: an unknown name (all are listed), or an option that this loss cannot honour (those that
        can are listed).
    """
    if loss_type not in LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; the losses are: {', '.join(LOSSES)}")
    if label_smoothing and "label_smoothing" not in LOSSES[loss_type].options:
        able = [name for name, spec in LOSSES.items() if "label_smoothing" in spec.options]
        raise ValueError(
            f"loss_type {loss_type!r} cannot honour label_smoothing={label_smoothing}; these can: {', '.join(able)}"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), found {label_smoothing}")
    return LOSSES[loss_type]


def preference_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array | None = None,
    reference_rejected_logps: Array | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: Array | float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
) -> PreferenceLoss:
    """Loss and implicit rewards of each pair, from summed completion log-probabilities.

    Rewards are beta * (policy - reference) summed log-prob, for every loss (arXiv 2305.18290, section 4).

    Args:
      policy_chosen_logps, policy_rejected_logps: float [b], natural log, summed over completion tokens.
      reference_chosen_logps, reference_rejected_logps: float [b], the same under the reference.
      loss_type: a name in LOSSES.
      beta: strength of the tie to the reference, > 0; a number or a traced scalar.
      label_smoothing: e in [0, 0.5), a Python number.
      chosen_lengths, rejected_lengths: int [b], completion lengths in tokens, for losses that need them.

    Returns:
      PreferenceLoss(losses, chosen_rewards, rejected_rewards), float32 [b] each.

    Raises:
      ValueError: unknown loss, option it cannot honour, missing reference or lengths, shapes that differ.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros(1)
    >>> preference_loss(zeros, zeros, zeros, zeros).losses.round(4).tolist()     # policy == reference: ln 2
    [0.693...]
    """
    spec = check_loss(loss_type, label_smoothing=label_smoothing)
    if reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError(f"loss_type {loss_type!r} needs the reference's log-probs of both sides")
    if spec.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss_type {loss_type!r} needs chosen_lengths and rejected_lengths, in tokens")
    arrays = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    shapes = {jnp.shape(array) for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"the four log-prob arrays must have one shape, found {sorted(shapes)}")
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    chosen, rejected, reference_chosen, reference_rejected = (array.astype(dtype) for array in arrays)
    inputs = LossInputs(
        chosen_logratios=chosen - reference_chosen,
        rejected_logratios=rejected - reference_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    return PreferenceLoss(
        losses=spec.function(inputs),
        chosen_rewards=beta * inputs.chosen_logratios,
        rejected_rewards=beta * inputs.rejected_logratios,
    )
