"""What a step minimises: models to features of rows, features to losses, of padded and of packed batches.

Axes: k micro-batches one after the other, m rows of a micro-batch, b = k m.
A batch is a NamedTuple of arrays [k, m, ...]; of its features, `weights` [m] are 0 on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jdpo.losses.coupled import init_loss_state
from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
from jdpo.losses.pair_logps import (
    ApplyFn,
    LogpsFn,
    PairFeatures,
    belongs,
    completion_sums,
    packed_features,
    pair_features,
)
from jdpo.losses.pair_losses import Totals, feature_losses, next_loss_state, packed_totals, pair_totals
from jdpo.losses.router import of_real_rows
from jdpo.losses.settings import LossSettings
from jdpo.types import CompletionBatch, PackedBatch, Routed, RouterStats

Array = Any
Params = Any
Batch = Any
Features = Any


class Objective(NamedTuple):
    """What is minimised, in two halves: models to features of rows, features to losses.

    The sum of the losses of all real rows over totals.normalizer is the loss of a step. Rows are read micro-batch by
    micro-batch; a loss that couples rows sees the features of all of them.

    Attributes:
      features: (params, reference_params, batch [m, ...]) -> a NamedTuple of [m, ...] arrays, `weights` among them.
      learnt: names of the features that depend on params.
      totals: batch [k, m, ...] -> what losses read of the global batch; a NamedTuple with `normalizer`.
      losses: (features [b, ...], totals, loss_state) -> (losses [b], metrics {name: [b]}).
      next_state: (features of the global batch, loss_state) -> the loss_state of the next step.
      init_state: the loss_state of the first step, or None.
      coupled: whether a row's loss depends on other rows.
      router_aux_loss_coef: what the router's load balancing loss, over all real tokens of the global batch, counts in
        the loss of a step; features then have `router`. None: the model has no router.
    """

    features: Callable[..., Features]
    learnt: tuple[str, ...]
    totals: Callable[[Batch], Any]
    losses: Callable[[Features, Any, Any], tuple[Array, dict[str, Array]]]
    next_state: Callable[[Features, Any], Any] = lambda features, loss_state: loss_state
    init_state: Any = None
    coupled: bool = False
    router_aux_loss_coef: float | None = None


def with_router_loss(objective: Objective, coef: float) -> Objective:
    """The same of a model with experts.

    The loss is a product of two means over the global batch: micro-batches are coupled by it, unless it counts nothing.
    """
    if not coef:
        return objective._replace(router_aux_loss_coef=coef)
    return objective._replace(router_aux_loss_coef=coef, learnt=(*objective.learnt, "router"), coupled=True)


def dpo_objective(settings: LossSettings, *, features: Callable[..., PairFeatures], totals: Any) -> Objective:
    """Mean preference loss over the real pairs of the global batch.

    Args:
      features: `pair_features` or `packed_features`, but for params, reference_params and batch.
      totals: `pair_totals` or `packed_totals`.
    """
    running = settings.bco_running_delta

    def losses(features: PairFeatures, totals: Totals, loss_state: Any) -> tuple[Array, dict[str, Array]]:
        return feature_losses(features, totals, settings=settings, loss_state=loss_state)

    def next_state(features: PairFeatures, loss_state: Any) -> Any:
        return next_loss_state(features, settings=settings, loss_state=loss_state) if running else None

    return Objective(
        features=partial(features, settings=settings),
        learnt=("policy_logps", "policy_ld_logps"),
        totals=totals,
        losses=losses,
        next_state=next_state,
        init_state=init_loss_state() if running else None,
        coupled=settings.needs_global_batch,
    )


def padded_dpo_objective(apply_fn: ApplyFn, settings: LossSettings) -> Objective:
    """Of PreferenceBatch: any model, every logit."""
    return dpo_objective(settings, features=partial(pair_features, apply_fn=apply_fn), totals=pair_totals)


def packed_dpo_objective(logps_fn: LogpsFn, settings: LossSettings) -> Objective:
    """Of PackedBatch."""
    return dpo_objective(settings, features=partial(packed_features, logps_fn=logps_fn), totals=packed_totals)


class CompletionFeatures(NamedTuple):
    """What the loss of supervised rows reads: summed completion log-probs and weights, [m] each; router as of pairs."""

    logps: Array
    weights: Array
    router: RouterStats | None = None


class CompletionTotals(NamedTuple):
    """What a row's loss reads of the global batch: its real completion tokens, a scalar."""

    normalizer: Array


def _sft_objective(features: Callable[..., CompletionFeatures], totals: Any) -> Objective:
    def losses(features: CompletionFeatures, totals: Any, loss_state: Any) -> tuple[Array, dict[str, Array]]:
        return -features.logps, {"loss": jax.lax.stop_gradient(-features.logps)}

    return Objective(features, ("logps",), totals, losses)


def padded_sft_objective(apply_fn: ApplyFn) -> Objective:
    """Mean negative log-likelihood over the completion tokens of the global batch, of CompletionBatch."""

    def features(params: Params, reference_params: Params, batch: CompletionBatch) -> CompletionFeatures:
        del reference_params  # maximum likelihood has none
        logits, router = apply_fn(params, batch.tokens, batch.attention_mask), None
        if isinstance(logits, Routed):
            logits, router = logits.output, of_real_rows(logits.router, batch.weights > 0)
        logps = sequence_logps(*shifted_token_logps(logits, batch.tokens, batch.completion_mask))
        return CompletionFeatures(logps, batch.weights, router)

    def totals(batch: CompletionBatch) -> CompletionTotals:
        real = batch.completion_mask[..., 1:] & (batch.weights > 0)[..., None]
        return CompletionTotals(real.sum().astype(batch.weights.dtype))

    return _sft_objective(features, totals)


def packed_sft_objective(logps_fn: LogpsFn) -> Objective:
    """The same of PackedBatch."""

    def features(params: Params, reference_params: Params, batch: PackedBatch) -> CompletionFeatures:
        del reference_params
        logps, _, router = logps_fn(params, batch, False)
        of_completion = belongs(batch.logp_pair, batch.pair_weight.shape[-1])
        sums = completion_sums(logps, of_completion, num_sides=1)
        return CompletionFeatures(sums.reshape(-1), batch.pair_weight.reshape(-1), router)

    def totals(batch: PackedBatch) -> CompletionTotals:
        real = batch.logp_pair < batch.pair_weight.shape[-1]
        return CompletionTotals(real.sum().astype(batch.pair_weight.dtype))

    return _sft_objective(features, totals)
