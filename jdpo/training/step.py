"""One optimizer step as a pure function, and the same jitted over a mesh.

Axes: k micro-batches one after the other, m rows of a micro-batch (split over the batch axes of the mesh).
A batch is a NamedTuple of arrays [k, m, ...] with `weights` [k, m], 0 on padding rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
from jdpo.losses.objective import ApplyFn, pair_losses, weighted_sum
from jdpo.sharding.placement import micro_batch_sharding, replicated
from jdpo.sharding.rules import LOGICAL_RULES
from jdpo.types import CompletionBatch, PreferenceBatch

Array = Any
Params = Any
Batch = Any
RowLosses = Callable[[Params, Params, Batch], tuple[Array, dict[str, Array]]]


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint must hold of the device's memory."""

    step: Array  # int32 scalar: updates made so far
    params: Params
    opt_state: Any
    rng: Array  # uint32 [2]: key of the run; a step's own key is fold_in(rng, step)


class Objective(NamedTuple):
    """What is minimised, as a sum over rows: rows(params, reference_params, batch) / normalizer(batch).

    Attributes:
      rows: gives the loss of each row [m] and per-row metrics {name: [m]}; rows are independent.
      normalizer: scalar of a whole [k, m] batch: its real pairs, or its completion tokens.
    """

    rows: RowLosses
    normalizer: Callable[[Batch], Array]


def dpo_objective(apply_fn: ApplyFn, *, loss_type: str, beta: float, label_smoothing: float) -> Objective:
    """Mean preference loss over the real pairs of the global batch."""

    def rows(params: Params, reference_params: Params, batch: PreferenceBatch) -> tuple[Array, dict[str, Array]]:
        return pair_losses(
            params,
            reference_params,
            batch,
            apply_fn=apply_fn,
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
        )

    return Objective(rows, lambda batch: batch.weights.sum())


def sft_objective(apply_fn: ApplyFn) -> Objective:
    """Mean negative log-likelihood over the completion tokens of the global batch."""

    def rows(params: Params, reference_params: Params, batch: CompletionBatch) -> tuple[Array, dict[str, Array]]:
        del reference_params  # maximum likelihood has none
        logits = apply_fn(params, batch.tokens, batch.attention_mask)
        logps = sequence_logps(*shifted_token_logps(logits, batch.tokens, batch.completion_mask))
        return -logps, {}

    def num_completion_tokens(batch: CompletionBatch) -> Array:
        real = batch.completion_mask[..., 1:] & (batch.weights > 0)[..., None]
        return real.sum().astype(batch.weights.dtype)

    return Objective(rows, num_completion_tokens)


class StepReport(NamedTuple):
    """What the host learns of a step.

    Attributes:
      loss: scalar, normalised over the global batch.
      grad_norm: scalar, before clipping.
      learning_rate: scalar, of this update.
      finite: bool scalar, whether loss, gradients and the updated weights are numbers.
      rows: {name: [k, m]} per-row values, `loss` among them; those of padding rows mean nothing.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    finite: Array
    rows: dict[str, Array]


class EvaluationReport(NamedTuple):
    """Per-row values of a batch {name: [k, m]}, and what the loss's sum is to be divided by."""

    rows: dict[str, Array]
    normalizer: Array


def loss_and_grads(
    objective: Objective, params: Params, reference_params: Params, batch: Batch
) -> tuple[Array, Params, dict[str, Array]]:
    """Loss, gradients and per-row values {name: [k, m]} of a global batch, one micro-batch after the other.

    The normalizer is of the whole batch, so that the result does not depend on how it is cut.
    """
    normalizer = objective.normalizer(batch)

    def micro_loss(params: Params, micro: Batch) -> tuple[Array, dict[str, Array]]:
        losses, metrics = objective.rows(params, reference_params, micro)
        rows = {**metrics, "loss": losses}
        return weighted_sum(losses, micro.weights) / normalizer, rows

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
    if batch.weights.shape[0] == 1:  # no accumulator where there is nothing to accumulate
        (loss, rows), grads = value_and_grad(params, jax.tree.map(lambda array: array[0], batch))
        return loss, grads, jax.tree.map(lambda array: array[None], rows)

    def accumulate(total: Params, micro: Batch) -> tuple[Params, tuple[Array, dict[str, Array]]]:
        value, grads = value_and_grad(params, micro)
        return jax.tree.map(jnp.add, total, grads), value

    grads, (losses, rows) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), batch)
    return losses.sum(), grads, rows


def train_step(
    state: TrainState,
    reference_params: Params,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: Params,
) -> tuple[TrainState, StepReport]:
    """One update. Pure."""
    loss, grads, rows = loss_and_grads(objective, state.params, reference_params, batch)
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    weights_finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.stack(weights_finite).all()
    report = StepReport(loss, grad_norm, jnp.asarray(schedule(state.step)), finite, rows)
    return TrainState(state.step + 1, params, opt_state, state.rng), report


def evaluate(params: Params, reference_params: Params, batch: Batch, *, objective: Objective) -> EvaluationReport:
    """Per-row losses and metrics of a [k, m] batch, without gradients."""

    def micro_rows(_: None, micro: Batch) -> tuple[None, dict[str, Array]]:
        losses, metrics = objective.rows(params, reference_params, micro)
        return None, {**metrics, "loss": losses}

    _, rows = jax.lax.scan(micro_rows, None, batch)
    return EvaluationReport(rows, objective.normalizer(batch))


class Compiled(NamedTuple):
    """The jitted functions of a run; both take and give arrays on the mesh."""

    train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, StepReport]]
    evaluate: Callable[[Params, Params, Batch], EvaluationReport]


def compile_step(
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state_shardings: TrainState,
    with_reference: bool,
) -> Compiled:
    """Jits step and evaluation over the mesh: explicit in and out shardings, the old state donated.

    jax.jit with in_shardings and out_shardings is what pjit was.
    """
    batch_sharding, whole = micro_batch_sharding(mesh), replicated(mesh)
    params_sharding = state_shardings.params
    reference_sharding = params_sharding if with_reference else None
    step = partial(train_step, objective=objective, optimizer=optimizer, schedule=schedule, shardings=params_sharding)
    return Compiled(
        _on_mesh(
            mesh,
            jax.jit(
                step,
                in_shardings=(state_shardings, reference_sharding, batch_sharding),
                out_shardings=(state_shardings, whole),
                donate_argnums=0,
            ),
        ),
        _on_mesh(
            mesh,
            jax.jit(
                partial(evaluate, objective=objective),
                in_shardings=(params_sharding, reference_sharding, batch_sharding),
                out_shardings=whole,
            ),
        ),
    )


def _on_mesh(mesh: Mesh, function: Any) -> Any:
    """Calls under the mesh and the logical rules: without both, sharding constraints lower to nothing."""

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return function(*args)

    def lower(*args: Any) -> Any:
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return function.lower(*args)

    call.lower = lower  # type: ignore[attr-defined]
    return call
