"""One optimizer step as a pure function, and the same jitted over a mesh.

Axes: k micro-batches one after the other, m rows of a micro-batch (split over the batch axes of the mesh), b = k m.
A batch is a NamedTuple of arrays [k, m, ...]; of its features, `weights` [m] are 0 on padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jdpo.models.lora.adapters import Lora, weights_of
from jdpo.models.lora.base_weights import Base
from jdpo.models.transformer import Weights
from jdpo.sharding.placement import micro_batch_sharding, replicated
from jdpo.sharding.rules import LOGICAL_RULES
from jdpo.training.step.gradients import flat_features, loss_and_grads, rows_of, scan_features
from jdpo.training.step.objectives import Batch, Features, Objective
from jdpo.training.step.rounding import apply_updates, store, wide
from jdpo.types import RouterStats

Array = Any
Params = Any


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint must hold of the device's memory."""

    step: Array  # int32 scalar: updates made so far
    params: Params
    opt_state: Any
    rng: Array  # uint32 [2]: key of the run; a step's own key is fold_in(rng, step)
    loss_state: Any = None  # a loss's running state, None where none has one
    reference_params: Params = None  # the reference where it moves (TR-DPO), None where it is frozen for good


class Frozen(NamedTuple):
    """Weights that steps read and never change; an argument of its own, which is not donated.

    Attributes:
      base: what adapters stand beside; None where all weights are trained.
      reference: a frozen model that runs in the step, None where none does or where it moves and is in the state.
        Weights, or with a base adapters on it: none at all, {}, for the base alone.
    """

    base: Base | None = None
    reference: Params = None


def saved_parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint holds, by name; TrainState(**parts) is the state again."""
    return {name: part for name, part in state._asdict().items() if part is not None}


class StepReport(NamedTuple):
    """What the host learns of a step.

    Attributes:
      loss: scalar, normalised over the global batch, without the router's.
      grad_norm: scalar, before clipping.
      learning_rate: scalar, of this update.
      finite: bool scalar, whether loss, gradients and the updated weights are numbers.
      rows: {name: [k, m]} per-row values, `loss` among them; those of padding rows mean nothing.
      aux_loss: scalar, the router's load balancing loss, of a model with experts.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    finite: Array
    rows: dict[str, Array]
    aux_loss: Array | None = None


class EvaluationReport(NamedTuple):
    """Per-row values of a batch {name: [k, m]}, and what the loss's sum is to be divided by.

    `router`: what the router did with the batch, [1, ...], of a model with experts.
    """

    rows: dict[str, Array]
    normalizer: Array
    router: RouterStats | None = None


class ReferenceSync(NamedTuple):
    """TR-DPO (arXiv 2404.09656): every `steps` updates the reference becomes alpha policy + (1 - alpha) reference."""

    alpha: float
    steps: int

    def moved(self, reference: Params, params: Params, key: Array) -> Params:
        """The reference after a move; `key` is of its rounding, where it is kept in bfloat16."""
        mixed = jax.tree.map(lambda new, old: self.alpha * new + (1 - self.alpha) * old, wide(params), wide(reference))
        return store([mixed], [reference], key)[0]


def over_base(objective: Objective, lora: Lora | None, base: Base | None) -> Objective:
    """The objective of adapters alone, the base being given; without one the objective itself."""
    if lora is None:
        return objective
    assert base is not None

    def features(params: Params, reference_params: Params, batch: Batch) -> Features:
        on_base = reference_params is not None and not isinstance(reference_params, Weights)
        reference = weights_of(lora, base, reference_params) if on_base else reference_params
        return objective.features(weights_of(lora, base, params), reference, batch)

    return objective._replace(features=features)


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
    lora: Lora | None = None,
) -> tuple[TrainState, StepReport]:
    """One update. Pure.

    Gradients are measured, clipped and turned into an update in float32 or wider; what is kept in bfloat16 is rounded
    stochastically.

    Args:
      frozen: without a reference where the batch carries log-probs, where there is none, and with `sync`, whose
        reference is part of the state.
      lora: how adapters stand beside `frozen.base`; None where the state's params are all weights.
    """
    reference = frozen.reference if sync is None else state.reference_params
    objective = over_base(objective, lora, frozen.base)
    loss, grads, rows, loss_state, aux_loss = loss_and_grads(
        objective, state.params, reference, batch, state.loss_state
    )
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    moments_key, weights_key, reference_key = jax.random.split(key, 3)  # of rounding; read where something is bfloat16
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.params, key=moments_key)
    params = apply_updates(state.params, updates, weights_key)
    grad_norm = optax.tree.norm(wide(grads))
    weights_finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.stack(weights_finite).all()
    report = StepReport(loss, grad_norm, jnp.asarray(schedule(state.step)), finite, rows, aux_loss)
    step = state.step + 1
    if sync is not None:
        reference = jax.lax.cond(
            step % sync.steps == 0,
            lambda: sync.moved(reference, params, reference_key),
            lambda: reference,
        )
    kept = None if sync is None else reference
    return TrainState(step, params, opt_state, state.rng, loss_state, kept), report


def evaluate(
    params: Params,
    frozen: Frozen,
    batch: Batch,
    loss_state: Any = None,
    totals: Any = None,
    *,
    objective: Objective,
    lora: Lora | None = None,
) -> EvaluationReport:
    """Per-row losses and metrics of a [k, m] batch, without gradients.

    Args:
      frozen: with the reference as it is now, where it moves.
      totals: of all that is evaluated, so that a mean over its tokens does not depend on how it is cut into batches;
        None: of this batch.
    """
    of_batch = objective.totals(batch)
    features_of = partial(over_base(objective, lora, frozen.base).features, reference_params=frozen.reference)
    features = scan_features(features_of, params, batch)
    rows = rows_of(objective, features, of_batch if totals is None else totals, loss_state)
    router = None
    if objective.router_aux_loss_coef is not None:
        router = jax.tree.map(lambda array: array.sum(0, keepdims=True), flat_features(features).router)
    return EvaluationReport(rows, of_batch.normalizer, router)


class Compiled(NamedTuple):
    """The jitted functions of a run; both take and give arrays on the mesh."""

    train_step: OnMesh
    evaluate: OnMesh


def compile_step(
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state_shardings: TrainState,
    frozen_shardings: Frozen,
    sync: ReferenceSync | None = None,
    lora: Lora | None = None,
) -> Compiled:
    """Jits step and evaluation over the mesh: explicit in and out shardings, the old state donated.

    jax.jit with in_shardings and out_shardings is what pjit was.

    Args:
      frozen_shardings: of what steps read beside the state.
    """
    batch_sharding, whole = micro_batch_sharding(mesh), replicated(mesh)
    params_sharding = state_shardings.params
    evaluated = frozen_shardings if sync is None else frozen_shardings._replace(reference=params_sharding)
    step = partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        shardings=params_sharding,
        sync=sync,
        lora=lora,
    )
    return Compiled(
        OnMesh(
            mesh,
            jax.jit(
                step,
                in_shardings=(state_shardings, frozen_shardings, batch_sharding),
                out_shardings=(state_shardings, whole),
                donate_argnums=0,
            ),
        ),
        OnMesh(
            mesh,
            jax.jit(
                partial(evaluate, objective=objective, lora=lora),
                in_shardings=(params_sharding, evaluated, batch_sharding, whole, whole),
                out_shardings=whole,
            ),
        ),
    )


class OnMesh:
    """A jitted function, called and lowered under the mesh and the logical rules.

    Without both, sharding constraints lower to nothing.
    """

    def __init__(self, mesh: Mesh, function: Any) -> None:
        self._mesh, self._function = mesh, function

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return self._function(*args)

    def lower(self, *args: Any) -> Any:
        """The function for arguments of these shapes, ready to compile."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(LOGICAL_RULES):
            return self._function.lower(*args)
