"""Computes losses and metrics from log-probs of pairs: the second half of the preference objective.

The first half is `jdpo.losses.pair_logps`.

Axes: b pairs, n=2 (chosen, rejected).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.losses.catalogue import FUNCTIONS
from jdpo.losses.coupled import LossState, init_loss_state, update_loss_state
from jdpo.losses.pair_logps import PairFeatures
from jdpo.losses.pairwise import LossInputs, divergence_score
from jdpo.losses.reference_free import sft
from jdpo.losses.settings import DEFAULTS, LossSettings
from jdpo.types import CHOSEN, REJECTED, PackedBatch, PreferenceBatch

Array = jax.Array


PREFERENCE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Names of the metrics that every loss has; a sum of several losses adds `loss/<name>` for each of them."""


def metric_names(settings: LossSettings) -> tuple[str, ...]:
    """Returns the names of the metrics of `feature_losses`."""
    parts = tuple(f"loss/{name}" for name in settings.terms) if len(settings.terms) > 1 else ()
    return PREFERENCE_METRICS + parts


class Totals(NamedTuple):
    """Totals of the global batch that the loss of a pair reads; scalars.

    Attributes:
      normalizer: number of real pairs.
      num_chosen_tokens: number of predicted completion tokens of the chosen sides, for means over tokens.
    """

    normalizer: Array | float
    num_chosen_tokens: Array | float


def pair_totals(batch: PreferenceBatch) -> Totals:
    """Counts pairs and chosen tokens of a batch of any leading shape."""
    weights = batch.weights
    if weights is None:
        weights = jnp.ones(batch.tokens.shape[:-2], jnp.float32)
    # From position 1: no position predicts the token at 0.
    lengths = batch.completion_mask[..., CHOSEN, 1:].astype(bool).sum(-1)
    return Totals(weights.sum(), jnp.where(weights > 0, weights * lengths, 0).sum())


def packed_totals(batch: PackedBatch) -> Totals:
    """Counts pairs and chosen tokens of packed rows of any leading shape."""
    pair, num_pairs = batch.logp_pair, batch.pair_weight.shape[-1]
    # Completions are numbered 2 * item + side, so the remainder is the side.
    is_chosen = (pair >= 0) & (pair < 2 * num_pairs) & (pair % 2 == CHOSEN)
    # Padding tokens have a pair out of range; clipped, they read some weight, which is_chosen then discards.
    weights = jnp.take_along_axis(batch.pair_weight, jnp.clip(pair // 2, 0, num_pairs - 1), axis=-1)
    return Totals(batch.pair_weight.sum(), jnp.where(is_chosen, weights, 0).sum())


def feature_losses(
    features: PairFeatures, totals: Totals, *, settings: LossSettings, loss_state: LossState | None = None
) -> tuple[Array, dict[str, Array]]:
    """Computes the loss of each pair, [b], and its metrics, {name: [b]}, which carry no gradient.

    Args:
      features: features of the pairs, which must be those of the global batch if a loss needs it.
      totals: totals of the global batch.
      loss_state: the running mean that bco_pair reads instead of bco_delta.
    """
    dtype = features.policy_logps.dtype
    seen, seen_reference = _seen_by_losses(features)
    inputs = loss_inputs(
        settings,
        seen,
        seen_reference,
        features.lengths,
        mean_chosen_tokens=token_share(totals.num_chosen_tokens, totals.normalizer, dtype),
        unweighted_policy=features.policy_logps,
        real=features.weights > 0,
        # The mean before this step: a delta that holds this batch's rewards would depend on the batch it judges.
        bco_delta=None if loss_state is None else loss_state.mean_reward.astype(dtype),
        score_margins=features.score_margins,
    )
    terms = loss_terms(settings, inputs)
    # WPO weighs each term, so that the logged parts still add up to the loss.
    if features.pair_weights is not None:
        terms = {name: values * features.pair_weights for name, values in terms.items()}
    losses = sum_of_terms(settings, terms)
    chosen, rejected = rewards(settings, features.policy_logps, features.reference_logps, features.lengths)
    values = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).astype(dtype),  # strict: ties count 0
        features.policy_logps[:, CHOSEN],
        features.policy_logps[:, REJECTED],
        *(terms[name] for name in settings.terms if len(settings.terms) > 1),
    )
    metrics = dict(zip(metric_names(settings), values, strict=True))
    return losses, jax.lax.stop_gradient(metrics)


def token_share(num_tokens: Array | float, num_pairs: Array | float, dtype: Any) -> Array:
    """Returns the number of chosen tokens per pair; at least one token and one pair are counted."""
    return jnp.maximum(jnp.asarray(num_tokens, dtype), 1) / jnp.maximum(jnp.asarray(num_pairs, dtype), 1)


def loss_inputs(
    settings: LossSettings,
    policy: Array,
    reference: Array | None,
    lengths: Array | None,
    *,
    mean_chosen_tokens: Array | None,
    unweighted_policy: Array | None = None,
    real: Array | None = None,
    bco_delta: Array | None = None,
    score_margins: Array | None = None,
) -> LossInputs:
    """Prepares the inputs of the losses from arrays [b, 2], with the sides last.

    Args:
      policy, reference: summed log-probs, with the weights of LD-DPO if ld_alpha is set.
      lengths: completion lengths in tokens.
      mean_chosen_tokens: chosen tokens of the global batch / its pairs, for means over tokens.
      unweighted_policy: `policy` without the weights of LD-DPO; None: the same.
      real: bool [b], False for padding pairs.
      bco_delta: replaces the option of that name.
      score_margins: float [b], above 0; None unless an option reads scores.
    """
    options = {**DEFAULTS, **settings.numbers}
    if bco_delta is not None:
        options["bco_delta"] = bco_delta
    # The likelihood of the chosen side counts every token fully, also under LD-DPO.
    sums = policy if unweighted_policy is None else unweighted_policy
    # The fields that no loss at hand reads are None in spite of their type, which saves each loss an assertion.
    sides: Any = (None, None) if lengths is None else (lengths[:, CHOSEN], lengths[:, REJECTED])
    ratios: Any = (None, None)
    scores: Any = (None, None)
    reference_margins: Any = None
    unread: Any = {"mean_chosen_tokens": mean_chosen_tokens, "real": real, "score_margins": score_margins}
    if reference is not None:
        ratios = (policy[:, CHOSEN] - reference[:, CHOSEN], policy[:, REJECTED] - reference[:, REJECTED])
        reference_margins = reference[:, CHOSEN] - reference[:, REJECTED]
        alpha = options["f_alpha_divergence_coef"]
        scores = tuple(divergence_score(ratio, settings.f_divergence_type, alpha) for ratio in ratios)
    return LossInputs(
        chosen_logps=policy[:, CHOSEN],
        rejected_logps=policy[:, REJECTED],
        chosen_logratios=ratios[0],
        rejected_logratios=ratios[1],
        reference_margins=reference_margins,
        chosen_scores=scores[0],
        rejected_scores=scores[1],
        chosen_lengths=sides[0],
        rejected_lengths=sides[1],
        chosen_nll=-sums[:, CHOSEN],
        **unread,
        beta=settings.beta,
        options=options,
    )


def loss_terms(settings: LossSettings, inputs: LossInputs) -> dict[str, Array]:
    """Computes each loss of the sum, [b] by name, multiplied by its weight; `rpo` is the term that rpo_alpha adds."""
    weighted = zip(settings.loss_types, settings.weights, strict=True)
    terms = {name: weight * FUNCTIONS[name](inputs) for name, weight in weighted}
    if "rpo_alpha" in settings.numbers:
        terms["rpo"] = settings.numbers["rpo_alpha"] * sft(inputs)
    return terms


def sum_of_terms(settings: LossSettings, terms: dict[str, Array]) -> Array:
    """Returns the loss of each pair, [b]."""
    # From the first term, since 0 + x would be one more operation in every program.
    first, *rest = (terms[name] for name in settings.terms)
    return sum(rest, start=first)


def rewards(
    settings: LossSettings, policy: Array, reference: Array | None, lengths: Array | None
) -> tuple[Array, Array]:
    """Computes implicit rewards (chosen, rejected), [b] each, from summed log-probs [b, 2] without LD-DPO weights."""
    values = policy if reference is None else policy - reference
    if reference is None and settings.mean_rewards:
        assert lengths is not None
        values = values / jnp.maximum(lengths, 1)
    values = settings.beta * values
    return values[:, CHOSEN], values[:, REJECTED]


def _seen_by_losses(features: PairFeatures) -> tuple[Array, Array | None]:
    if features.policy_ld_logps is None:
        return features.policy_logps, features.reference_logps
    return features.policy_ld_logps, features.reference_ld_logps


def next_loss_state(
    features: PairFeatures, *, settings: LossSettings, loss_state: LossState | None
) -> LossState | None:
    """Returns the running state after a global batch, without gradient, or None if no loss has one."""
    if not settings.has_state:
        return None
    policy, reference = _seen_by_losses(features)
    assert reference is not None
    ratios = settings.beta * (policy - reference)
    state = update_loss_state(
        init_loss_state() if loss_state is None else loss_state,
        ratios[:, CHOSEN],
        ratios[:, REJECTED],
        features.weights,
    )
    return jax.lax.stop_gradient(state)


def weighted_sum(values: Array, weights: Array) -> Array:
    """Sums weights * values, where a weight of 0 removes its value, even NaN.

    >>> import jax.numpy as jnp
    >>> weighted_sum(jnp.array([3.0, 4.0, jnp.nan]), jnp.array([1.0, 0.5, 0.0])).item()
    5.0
    """
    return jnp.where(weights > 0, values * weights, 0).sum()
