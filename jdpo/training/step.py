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

from jdpo.losses.objective import ApplyFn, pair_logps, pair_losses, reference_pair_logps, weighted_sum
from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
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


def summed_loss_and_grads(
    objective: Objective, params: Params, reference_params: Params, batch: Batch
) -> tuple[Params, Array, dict[str, Array]]:
    """Gradients of the loss over all micro-batches, each row's loss [k, m] and the metrics' sums.

    The normalizer is of the whole batch, so that the result does not depend on how it is cut.
    """
    normalizer = objective.normalizer(batch)

    def micro_loss(params: Params, micro: Batch) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        losses, metrics = objective.rows(params, reference_params, micro)
        sums = {name: weighted_sum(values, micro.weights) for name, values in metrics.items()}
        return weighted_sum(losses, micro.weights) / normalizer, (jax.lax.stop_gradient(losses), sums)

    grad_fn = jax.grad(micro_loss, has_aux=True)

    def accumulate(grads: Params, micro: Batch) -> tuple[Params, tuple[Array, dict[str, Array]]]:
        more, aux = grad_fn(params, micro)
        return jax.tree.map(jnp.add, grads, more), aux

    if batch.weights.shape[0] == 1:  # no accumulator where there is nothing to accumulate
        grads, (losses, sums) = grad_fn(params, jax.tree.map(lambda array: array[0], batch))
        return grads, losses[None], sums
    grads, (losses, sums) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), batch)
    return grads, losses, jax.tree.map(lambda array: array.sum(0), sums)


def train_step(
    state: TrainState,
    reference_params: Params,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: Params,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Pure.

    Returns:
      the new state, and metrics: scalars, and `row_losses` [k, m] for naming the rows of a bad step.
    """
    grads, losses, sums = summed_loss_and_grads(objective, state.params, reference_params, batch)
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": weighted_sum(losses, batch.weights) / objective.normalizer(batch),
        "grad_norm": optax.global_norm(grads),
        "learning_rate": schedule(state.step),
        **{name: total / batch.weights.sum() for name, total in sums.items() if name != "loss"},
        "row_losses": losses,
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.rng), metrics


def evaluation_sums(
    params: Params, reference_params: Params, batch: Batch, *, objective: Objective
) -> dict[str, Array]:
    """Sums over the rows of a [k, m] batch: of each metric, of the loss, and what they are to be divided by."""

    def micro_sums(_: None, micro: Batch) -> tuple[None, dict[str, Array]]:
        losses, metrics = objective.rows(params, reference_params, micro)
        return None, {
            name: weighted_sum(values, micro.weights) for name, values in {**metrics, "loss": losses}.items()
        }

    _, sums = jax.lax.scan(micro_sums, None, batch)
    return {
        **jax.tree.map(lambda array: array.sum(0), sums),
        "normalizer": objective.normalizer(batch),
        "rows": batch.weights.sum(),
    }


class Compiled(NamedTuple):
    """The jitted functions of a run; every one takes and gives arrays on the mesh."""

    train_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[..., dict[str, Array]]
    start_logps: Callable[..., tuple[Array, Array]] | None


def compile_step(
    *,
    objective: Objective,
    apply_fn: ApplyFn,
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
    step = partial(
        train_step, objective=objective, optimizer=optimizer, schedule=schedule, shardings=params_sharding
    )
    evaluate = partial(evaluation_sums, objective=objective)

    def start_logps(params: Params, reference_params: Params, batch: PreferenceBatch) -> tuple[Array, Array]:
        flat: PreferenceBatch = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), batch)
        reference = reference_pair_logps(reference_params, flat, apply_fn=apply_fn)
        return pair_logps(params, flat, apply_fn=apply_fn), reference

    return Compiled(
        train_step=_on_mesh(
            mesh,
            jax.jit(
                step,
                in_shardings=(state_shardings, reference_sharding, batch_sharding),
                out_shardings=(state_shardings, whole),
                donate_argnums=0,
            ),
        ),
        evaluate=_on_mesh(
            mesh,
            jax.jit(
                evaluate,
                in_shardings=(params_sharding, reference_sharding, batch_sharding),
                out_shardings=whole,
            ),
        ),
        start_logps=_on_mesh(
            mesh,
            jax.jit(
                start_logps,
                in_shardings=(params_sharding, reference_sharding, batch_sharding),
                out_shardings=whole,
            ),
        )
        if with_reference
        else None,
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
