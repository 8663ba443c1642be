"""One optimizer step as a pure function: loss and gradients of a global batch, the update, and the evaluation.

Axes: k micro-batches one after the other, m rows of a micro-batch (split over the batch axes of the mesh), b = k m.
A batch is a NamedTuple of arrays [k, m, ...]; among its features, `weights` [m] are 0 on padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdpo.devices import target
from jdpo.losses.pair_losses import weighted_sum
from jdpo.losses.router import load_balancing_loss
from jdpo.models.lora.base_weights import Base
from jdpo.training.step.accumulation import accumulate
from jdpo.training.step.objectives import Batch, Features, Objective
from jdpo.training.step.rounding import apply_updates, store, wide
from jdpo.types import RouterStats

Array = jax.Array
Params = Any


class TrainState(NamedTuple):
    """Everything that a step changes, and everything on the devices that a checkpoint must hold."""

    step: Array  # int32 scalar: updates made so far
    params: Params
    opt_state: Any
    rng: Array  # uint32 [2]: the run's key; the key of a step is fold_in(rng, step)
    loss_state: Any = None  # a loss's running state, None where none has one
    reference_params: Params = None  # the reference where it moves (TR-DPO), None where it is frozen for good


class Frozen(NamedTuple):
    """Weights that steps read and never change. They are an argument of their own, which is not donated.

    Attributes:
      base: the weights under adapters; None where all weights are trained.
      reference: a frozen model that runs in the step; None where there is none, or where it moves and is in the state.
        With a base these are adapters on it ({} for the base alone), or Weights of a model of its own.
    """

    base: Base | None = None
    reference: Params = None


def saved_parts(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that a checkpoint holds, by name; TrainState(**parts) is the state again."""
    return {name: part for name, part in state._asdict().items() if part is not None}


class StepReport(NamedTuple):
    """The values of a step that the host reads.

    Attributes:
      loss: scalar, normalised over the global batch, without the router's.
      grad_norm: scalar, before clipping.
      learning_rate: scalar, of this update.
      finite: bool scalar, True if loss, gradients and the updated weights are all finite.
      rows: {name: [k, m]} per-row values, `loss` among them; values of padding rows mean nothing.
      aux_loss: scalar, the router's load balancing loss, for models with experts.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    finite: Array
    rows: dict[str, Array]
    aux_loss: Array | None = None


class EvaluationReport(NamedTuple):
    """The values of an evaluated batch.

    Attributes:
      rows: {name: [k, m]} per-row values.
      normalizer: scalar, what the sum of the rows' losses is divided by.
      router: what the router did with the batch, [1, ...], for models with experts.
    """

    rows: dict[str, Array]
    normalizer: Array
    router: RouterStats | None = None


class ReferenceSync(NamedTuple):
    """TR-DPO (arXiv 2404.09656): every `steps` updates the reference becomes alpha policy + (1 - alpha) reference."""

    alpha: float
    steps: int

    def moved(self, reference: Params, params: Params, key: Array) -> Params:
        """Returns the reference after a move; `key` is for its rounding, where it is kept in bfloat16."""
        mixed = jax.tree.map(lambda new, old: self.alpha * new + (1 - self.alpha) * old, wide(params), wide(reference))
        return store([mixed], [reference], key)[0]


# --- the step


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: Params,
    sync: ReferenceSync | None = None,
) -> tuple[TrainState, StepReport]:
    """Makes one update. Pure.

    Gradients are measured, clipped and turned into an update in float32 or wider; what is kept in bfloat16 is rounded
    stochastically.

    Args:
      frozen: without a reference where the batch carries log-probs, where there is none, and with `sync`, whose
        reference is part of the state.
      shardings: of the gradients: those of the params.
    """
    reference = frozen.reference if sync is None else state.reference_params
    loss, grads, rows, loss_state, aux_loss = loss_and_grads(
        objective, state.params, reference, batch, state.loss_state, frozen.base
    )
    # Split as their weights are, so that no device holds whole gradients.
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    # From the step number, so that a resumed run rounds as an uninterrupted one.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    moments_key, weights_key, reference_key = jax.random.split(key, 3)  # for rounding to bfloat16, where any is kept
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.params, key=moments_key)
    params = apply_updates(state.params, updates, weights_key)
    # Before clipping, which would hide that gradients grow.
    grad_norm = optax.tree.norm(wide(grads))
    # An update may overflow where loss and gradients are finite.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(params)
    # The rate at the step before it is incremented, which is the count that optax reads for this update.
    report = StepReport(loss, grad_norm, jnp.asarray(schedule(state.step)), finite, rows, aux_loss)
    step = state.step + 1
    # After the update, as TRL does; both branches are compiled, and one runs.
    if sync is not None:
        reference = jax.lax.cond(
            step % sync.steps == 0,
            lambda: sync.moved(reference, params, reference_key),
            lambda: reference,
        )
    kept = None if sync is None else reference
    return TrainState(step, params, opt_state, state.rng, loss_state, kept), report


def all_finite(params: Params) -> Array:
    """Returns a bool scalar, True if no weight is NaN or Inf. The weights have just been computed."""
    # XLA for GPUs would add this sum to the kernel that computes the weights and then divide that kernel in two, of
    # which the second reads the moments again. For TPUs it makes one kernel of all.
    params = jax.lax.optimization_barrier(params) if target().platform == "gpu" else params
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def evaluate(
    params: Params,
    frozen: Frozen,
    batch: Batch,
    loss_state: Any = None,
    totals: Any = None,
    *,
    objective: Objective,
) -> EvaluationReport:
    """Computes per-row losses and metrics of a [k, m] batch, without gradients.

    Args:
      frozen: with the reference as it is now, where it moves.
      totals: of all evaluated rows, so that a mean over their tokens does not depend on how they are cut into batches;
        None: of this batch.
    """
    of_batch = objective.totals(batch)
    features_of = partial(objective.features, reference_params=frozen.reference, base=frozen.base)
    features = scan_features(features_of, params, batch)
    rows = rows_of(objective, features, of_batch if totals is None else totals, loss_state)
    router = None
    if objective.router_aux_loss_coef is not None:
        # Summed over micro-batches, so that the host can add up batches.
        router = jax.tree.map(lambda array: array.sum(0, keepdims=True), flat_features(features).router)
    return EvaluationReport(rows, jnp.asarray(of_batch.normalizer), router)


# --- loss and gradients


class LossAndGrads(NamedTuple):
    """The loss of a global batch and its gradients.

    Attributes:
      loss: scalar, without the router's.
      grads: of everything that is minimised, the router's loss included.
      rows: per-row values {name: [k, m]}.
      loss_state: of the next step.
      aux_loss: scalar, the router's load balancing loss, for models with experts.
    """

    loss: Array
    grads: Params
    rows: dict[str, Array]
    loss_state: Any
    aux_loss: Array | None = None


def loss_and_grads(
    objective: Objective,
    params: Params,
    reference_params: Params,
    batch: Batch,
    loss_state: Any = None,
    base: Base | None = None,
) -> LossAndGrads:
    """Computes loss and gradients of a global batch, one micro-batch after the other.

    The sums are normalised by totals of the whole batch, so that the result does not depend on how it is cut.

    Args:
      base: the weights under adapters, where `params` are adapters.
    """
    totals: Any = objective.totals(batch)

    def total_loss(features: Features) -> Array:
        losses, _ = objective.losses(features, totals, loss_state)
        loss: Array = weighted_sum(losses, features.weights) / totals.normalizer
        if objective.router_aux_loss_coef:
            loss = loss + objective.router_aux_loss_coef * load_balancing_loss(features.router)
        return loss

    features_of = partial(objective.features, reference_params=reference_params, base=base)
    # Rows that depend on each other need the features of all micro-batches before any gradient.
    in_parts = objective.coupled and num_micro(batch) > 1
    loss, grads, features = (_two_passes if in_parts else _one_pass)(objective, features_of, total_loss, params, batch)
    rows = rows_of(objective, features, totals, loss_state)
    aux_loss, flat = None, flat_features(features)
    if objective.router_aux_loss_coef is not None:
        aux_loss = load_balancing_loss(flat.router)
        # The router's loss was minimised with it, but is reported next to it.
        loss = weighted_sum(rows["loss"].reshape(-1), flat.weights) / totals.normalizer
    return LossAndGrads(loss, grads, rows, objective.next_state(flat, loss_state), aux_loss)


def _one_pass(
    objective: Objective, features_of: Any, total_loss: Any, params: Params, batch: Batch
) -> tuple[Array, Params, Features]:
    """Loss, gradients and features where the losses of micro-batches add up."""

    def micro_loss(params: Params, micro: Batch) -> tuple[Array, Features]:
        features = features_of(params, batch=micro)
        return total_loss(features), features

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
    if num_micro(batch) == 1:  # no accumulator where there is nothing to accumulate
        (loss, features), grads = value_and_grad(params, jax.tree.map(lambda array: array[0], batch))  # [m, ...]
        return loss, grads, jax.tree.map(lambda array: array[None], features)

    def grads_of(params: Params, micro: Batch) -> tuple[Params, tuple[Array, Features]]:
        (loss, features), grads = value_and_grad(params, micro)
        return grads, (loss[None], features)

    grads, (losses, features) = accumulate(grads_of, params, batch)
    # Every part is divided by the totals of the whole batch already, so parts are added and not averaged.
    return losses.sum(), grads, features


def _two_passes(
    objective: Objective, features_of: Any, total_loss: Any, params: Params, batch: Batch
) -> tuple[Array, Params, Features]:
    """Loss, gradients and features where rows depend on each other: all features first, then their gradients."""
    features = scan_features(features_of, params, batch)

    def learnt(features: Features) -> dict[str, Array]:
        return {name: getattr(features, name) for name in objective.learnt}

    # From features alone: no model runs here, so that all micro-batches can be in one graph.
    loss, cotangents = jax.value_and_grad(lambda values: total_loss(flat_features(features._replace(**values))))(
        learnt(features)
    )

    # The features of each micro-batch are computed a second time, so that one micro-batch's activations exist at once.
    def pull_back(params: Params, micro: tuple[Batch, Any]) -> tuple[Params, None]:
        batch, cotangents = micro
        _, vjp = jax.vjp(lambda params: learnt(features_of(params, batch=batch)), params)
        return vjp(cotangents)[0], None

    grads, _ = accumulate(pull_back, params, (batch, cotangents))
    return loss, grads, features


def num_micro(batch: Batch) -> int:
    """Returns the number of micro-batches of a [k, m, ...] batch."""
    return int(jax.tree.leaves(batch)[0].shape[0])


def scan_features(features_of: Any, params: Params, batch: Batch) -> Features:
    """Computes the features of a [k, m] batch, one micro-batch after the other."""
    return jax.lax.map(lambda micro: features_of(params, batch=micro), batch)


def flat_features(features: Features) -> Features:
    """Reshapes [k, m, ...] to [(k m), ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), features)


def rows_of(objective: Objective, features: Features, totals: Any, loss_state: Any) -> dict[str, Array]:
    """Computes per-row values {name: [k, m]} from the features of a global batch."""
    _, metrics = objective.losses(flat_features(features), totals, loss_state)
    return {name: values.reshape(features.weights.shape) for name, values in metrics.items()}
