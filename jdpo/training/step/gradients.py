"""Loss and gradients of a global batch as a pure function, one micro-batch after the other.

Axes: k micro-batches one after the other, m rows of a micro-batch. A batch is a NamedTuple of arrays [k, m, ...]; of
its features, `weights` [m] are 0 on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.losses.pair_losses import weighted_sum
from jdpo.losses.router import load_balancing_loss
from jdpo.training.step.objectives import Batch, Features, Objective
from jdpo.training.step.rounding import wide

Array = Any
Params = Any


class LossAndGrads(NamedTuple):
    """What a global batch gives: scalar loss, gradients, per-row values {name: [k, m]}, the next loss_state, and of a
    model with experts the router's load balancing loss, which the gradients are of as well."""

    loss: Array
    grads: Params
    rows: dict[str, Array]
    loss_state: Any
    aux_loss: Array | None = None


def loss_and_grads(
    objective: Objective, params: Params, reference_params: Params, batch: Batch, loss_state: Any = None
) -> LossAndGrads:
    """Loss and gradients of a global batch, one micro-batch after the other.

    What normalises is of the whole batch, so that the result does not depend on how it is cut.
    """
    totals = objective.totals(batch)

    def total_loss(features: Features) -> Array:
        losses, _ = objective.losses(features, totals, loss_state)
        loss = weighted_sum(losses, features.weights) / totals.normalizer
        if objective.router_aux_loss_coef:
            loss = loss + objective.router_aux_loss_coef * load_balancing_loss(features.router)
        return loss

    features_of = partial(objective.features, reference_params=reference_params)
    in_parts = objective.coupled and num_micro(batch) > 1
    loss, grads, features = (_two_passes if in_parts else _one_pass)(objective, features_of, total_loss, params, batch)
    rows = rows_of(objective, features, totals, loss_state)
    aux_loss, flat = None, flat_features(features)
    if objective.router_aux_loss_coef is not None:
        aux_loss = load_balancing_loss(flat.router)
        loss = weighted_sum(rows["loss"].reshape(-1), flat.weights) / totals.normalizer
    return LossAndGrads(loss, grads, rows, objective.next_state(flat, loss_state), aux_loss)


def _one_pass(
    objective: Objective, features_of: Any, total_loss: Any, params: Params, batch: Batch
) -> tuple[Array, Params, Features]:
    """Loss, gradients and features of rows whose losses add up."""

    def micro_loss(params: Params, micro: Batch) -> tuple[Array, Features]:
        features = features_of(params, batch=micro)
        return total_loss(features), features

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
    if num_micro(batch) == 1:  # no accumulator where there is nothing to accumulate
        (loss, features), grads = value_and_grad(params, jax.tree.map(lambda array: array[0], batch))
        return loss, grads, jax.tree.map(lambda array: array[None], features)
    grads, (losses, features) = _accumulate(lambda micro: value_and_grad(params, micro)[::-1], params, batch)
    return losses.sum(), grads, features


def _two_passes(
    objective: Objective, features_of: Any, total_loss: Any, params: Params, batch: Batch
) -> tuple[Array, Params, Features]:
    """The same for rows that depend on each other: first their features, then the features' cotangents."""
    features = scan_features(features_of, params, batch)

    def learnt(features: Features) -> dict[str, Array]:
        return {name: getattr(features, name) for name in objective.learnt}

    loss, cotangents = jax.value_and_grad(lambda values: total_loss(flat_features(features._replace(**values))))(
        learnt(features)
    )

    def pull_back(micro: tuple[Batch, Any]) -> tuple[Params, None]:
        batch, cotangents = micro
        _, vjp = jax.vjp(lambda params: learnt(features_of(params, batch=batch)), params)
        return vjp(cotangents)[0], None

    grads, _ = _accumulate(pull_back, params, (batch, cotangents))
    return loss, grads, features


def num_micro(batch: Batch) -> int:
    """Micro-batches of a [k, m, ...] batch."""
    return int(jax.tree.leaves(batch)[0].shape[0])


def _accumulate(grads_of: Callable[[Any], tuple[Params, Any]], params: Params, micros: Any) -> tuple[Params, Any]:
    """Sum of gradients over micro-batches, float32 or wider, and whatever else each gives, stacked."""

    def step(total: Params, micro: Any) -> tuple[Params, Any]:
        grads, other = grads_of(micro)
        return jax.tree.map(jnp.add, total, wide(grads)), other

    # In float32 or wider: a sum in bfloat16 loses whatever is under 0.4 % of it.
    return jax.lax.scan(step, wide(jax.tree.map(jnp.zeros_like, params)), micros)


def scan_features(features_of: Any, params: Params, batch: Batch) -> Features:
    """Features of a [k, m] batch, one micro-batch after the other."""
    return jax.lax.map(lambda micro: features_of(params, batch=micro), batch)


def flat_features(features: Features) -> Features:
    """[k, m, ...] to [(k m), ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), features)


def rows_of(objective: Objective, features: Features, totals: Any, loss_state: Any) -> dict[str, Array]:
    """Per-row values {name: [k, m]} of a global batch's features."""
    _, metrics = objective.losses(flat_features(features), totals, loss_state)
    return {name: values.reshape(features.weights.shape) for name, values in metrics.items()}
