"""Losses and rewards of pairs from summed log-probabilities, by the name of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.losses.argument_checks import check_lengths, check_scores
from jdpo.losses.pair_losses import loss_inputs, loss_terms, rewards, sum_of_terms, token_share
from jdpo.losses.settings import loss_settings

Array = jax.Array


class PreferenceLoss(NamedTuple):
    """The results of a preference loss, float32 [b] each."""

    losses: Array
    chosen_rewards: Array
    rejected_rewards: Array


def preference_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array | None = None,
    reference_rejected_logps: Array | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: Array | float = 0.1,
    label_smoothing: Array | float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    score_margins: Array | None = None,
    **options: Any,
) -> PreferenceLoss:
    """Computes the loss and implicit rewards of each pair from summed log-probabilities of completions.

    Rewards are beta times the policy's log-prob minus the reference's, for every loss (arXiv 2305.18290, section 4).
    Without a reference they are beta times the policy's own log-prob, averaged over tokens if the loss averages too
    (`LossSpec.mean_rewards`).

    Args:
      policy_chosen_logps, policy_rejected_logps: float [b], natural logarithms, summed over completion tokens.
      reference_chosen_logps, reference_rejected_logps: float [b], the same under the reference. Losses without a
        reference do not read them.
      loss_type: a name in `LOSSES`, or several, whose weighted sum is computed.
      beta: strength of the pull towards the reference, above 0; like all numbers here, a number or a traced scalar.
      label_smoothing: e in [0, 0.5), the assumed probability that a preference label is flipped.
      chosen_lengths, rejected_lengths: int [b], completion lengths in tokens, for losses that need them; at least 1
        in each pair whose pair_weights is not 0 (checked where the values are known, so not under jit).
      score_margins: float [b], by how much the chosen answer was scored higher than the rejected one, for options that
        read scores; above 0 in each pair whose pair_weights is not 0 (checked where the values are known).
      **options: fields of `jdpo.loss_specs.LossOptions`, which docs/losses.md describes, and
        loss_weights: one weight per loss; default: 1 each.
        pair_weights: float [b], by which the loss of each pair is multiplied.
        num_chosen_tokens: number of chosen tokens of the batch, for means over tokens, whose loss per pair is
          -l_w * b / num_chosen_tokens; default: the sum of chosen_lengths.

    Returns:
      PreferenceLoss(losses, chosen_rewards, rejected_rewards), float32 [b] each.

    Raises:
      ValueError: an unknown loss or option, an option that the losses cannot honour, a missing reference or missing
        lengths or scores, or shapes that differ.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros(1)
    >>> preference_loss(zeros, zeros, zeros, zeros).losses.round(4).tolist()     # policy == reference: ln 2
    [0.693...]
    """
    for name, remedy in _OF_OBJECTIVE.items():
        if not (options.get(name) is None or options[name] is False):
            raise ValueError(f"{name} is an option of dpo_loss, which sees tokens and batches; here, {remedy}")
    settings, of_batch = loss_settings(loss_type, beta=beta, label_smoothing=label_smoothing, **options)
    given: tuple[Array | None, ...] = (policy_chosen_logps, policy_rejected_logps)
    if settings.needs_reference:
        given += (reference_chosen_logps, reference_rejected_logps)
    if any(array is None for array in given):
        raise ValueError(f"loss_type {loss_type!r} needs the reference's log-probs of both sides")
    arrays = [jnp.asarray(array) for array in given]
    per_pair = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "score_margins": score_margins}
    _check_shapes(arrays, **per_pair, **_weights_of(of_batch))
    check_lengths(chosen_lengths, rejected_lengths, of_batch.get("pair_weights"))
    if settings.needs_scores:
        check_scores(score_margins, of_batch.get("pair_weights"))
    # Half precision would lose the small differences of large sums on which every loss depends.
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    policy = jnp.stack([array.astype(dtype) for array in arrays[:2]], axis=-1)  # [b, 2]
    reference = jnp.stack([array.astype(dtype) for array in arrays[2:]], axis=-1) if len(arrays) > 2 else None
    lengths = None
    if chosen_lengths is not None and rejected_lengths is not None:
        lengths = jnp.stack([jnp.asarray(chosen_lengths), jnp.asarray(rejected_lengths)], axis=-1)  # [b, 2]
    elif settings.needs_lengths:
        raise ValueError(f"loss_type {loss_type!r} needs chosen_lengths and rejected_lengths, in tokens")
    mean_chosen_tokens = None
    if settings.token_mean:
        num_tokens = of_batch.get("num_chosen_tokens", None if chosen_lengths is None else jnp.sum(chosen_lengths))
        if num_tokens is None:
            raise ValueError(f"a mean over tokens needs num_chosen_tokens or chosen_lengths (loss_type {loss_type!r})")
        mean_chosen_tokens = token_share(num_tokens, policy.shape[0], dtype)
    scores = jnp.asarray(score_margins, dtype) if settings.needs_scores else None
    inputs = loss_inputs(
        settings, policy, reference, lengths, mean_chosen_tokens=mean_chosen_tokens, score_margins=scores
    )
    losses = sum_of_terms(settings, loss_terms(settings, inputs))
    if "pair_weights" in of_batch:
        # The losses alone: rewards describe a pair whatever its weight.
        losses = losses * of_batch["pair_weights"]
    return PreferenceLoss(losses, *rewards(settings, policy, reference, lengths))


_OF_OBJECTIVE = {
    "ld_alpha": "give sums that sequence_logps has weighed",
    "use_weighting": "give pair_weights",
    "bco_running_delta": "give bco_delta",
}
"""Options that need more than log-probs of pairs, with what to do instead."""


def _weights_of(of_batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in of_batch.items() if name == "pair_weights"}


def _check_shapes(logps: Sequence[Array], **others: Array | None) -> None:
    shapes = {jnp.shape(array) for array in logps}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"the log-prob arrays must have the same shape [b], found {sorted(shapes)}")
    (shape,) = shapes
    for name, array in others.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have the shape {shape} of the log-probs, found {jnp.shape(array)}")
