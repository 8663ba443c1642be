"""The second half of the preference objective: log-probs to losses and metrics; `jdpo.losses.pair_logps` is the first.

Axes: b pairs, n=2 (chosen, rejected).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.losses.coupled import LossState, init_loss_state, update_loss_state
from jdpo.losses.pair_logps import PairFeatures
from jdpo.losses.preference import loss_inputs, loss_terms, rewards, sum_of_terms, token_share
from jdpo.losses.settings import LossSettings
from jdpo.types import CHOSEN, REJECTED, PackedBatch, PreferenceBatch

Array = Any


PREFERENCE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Names of the metrics of every loss; a sum of several losses adds `loss/<name>` for each."""


def metric_names(settings: LossSettings) -> tuple[str, ...]:
    """Names of what `feature_losses` gives."""
    parts = tuple(f"loss/{name}" for name in settings.terms) if len(settings.terms) > 1 else ()
    return PREFERENCE_METRICS + parts


class Totals(NamedTuple):
    """What a pair's loss reads of the global batch; scalars.

    Attributes:
      normalizer: real pairs.
      num_chosen_tokens: predicted completion tokens of the chosen sides, for token means.
    """

    normalizer: Array
    num_chosen_tokens: Array


def pair_totals(batch: PreferenceBatch) -> Totals:
    """Counts pairs and chosen tokens of a batch of any leading shape."""
    weights = batch.weights
    if weights is None:
        weights = jnp.ones(batch.tokens.shape[:-2], jnp.float32)
    lengths = batch.completion_mask[..., CHOSEN, 1:].astype(bool).sum(-1)
    return Totals(weights.sum(), jnp.where(weights > 0, weights * lengths, 0).sum())


def packed_totals(batch: PackedBatch) -> Totals:
    """Counts pairs and chosen tokens of packed rows of any leading shape."""
    pair, num_pairs = batch.logp_pair, batch.pair_weight.shape[-1]
    is_chosen = (pair >= 0) & (pair < 2 * num_pairs) & (pair % 2 == CHOSEN)
    weights = jnp.take_along_axis(batch.pair_weight, jnp.clip(pair // 2, 0, num_pairs - 1), axis=-1)
    return Totals(batch.pair_weight.sum(), jnp.where(is_chosen, weights, 0).sum())


def feature_losses(
    features: PairFeatures, totals: Totals, *, settings: LossSettings, loss_state: LossState | None = None
) -> tuple[Array, dict[str, Array]]:
    """Loss of each pair, [b], and the metrics of each pair, {name: [b]}; metrics carry no gradient.

    Args:
      features: of the pairs; of the global batch where a loss needs it.
      totals: of the global batch.
      loss_state: read by bco_pair in the place of bco_delta.
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
        bco_delta=None if loss_state is None else loss_state.mean_reward.astype(dtype),
    )
    terms = loss_terms(settings, inputs)
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


def _seen_by_losses(features: PairFeatures) -> tuple[Array, Array | None]:
    if features.policy_ld_logps is None:
        return features.policy_logps, features.reference_logps
    return features.policy_ld_logps, features.reference_ld_logps


def next_loss_state(
    features: PairFeatures, *, settings: LossSettings, loss_state: LossState | None
) -> LossState | None:
    """The running state after a global batch, or None where no loss has one; carries no gradient."""
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
    """Sums weights * values, where a weight of 0 silences its value whatever it is, NaN included.

    >>> import jax.numpy as jnp
    >>> weighted_sum(jnp.array([3.0, 4.0, jnp.nan]), jnp.array([1.0, 0.5, 0.0])).item()
    5.0
    """
    return jnp.where(weights > 0, values * weights, 0).sum()
