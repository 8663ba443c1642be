"""A run's model, objective and optimizer as programs to lower, and the state that they work on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdpo.config import ReferenceSettings
from jdpo.losses.pair_losses import Totals
from jdpo.models.lora.adapters import num_met_params
from jdpo.models.self_attention import AttentionSettings
from jdpo.models.transformer import Transformer, Weights
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.placement import offloaded, state_shardings
from jdpo.training.fit.flops import Arithmetic, StepFlops, step_flops
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.validation import Mode
from jdpo.training.setup.weight_placement import abstract_frozen
from jdpo.training.step.gradients import num_micro
from jdpo.training.step.objectives import Batch, Objective
from jdpo.training.step.optimizer import learning_rate_schedule, make_optimizer
from jdpo.training.step.train_step import Compiled, Frozen, ReferenceSync, TrainState, compile_step
from jdpo.types import PackedBatch

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """What a run computes with, before anything is computed.

    Attributes:
      model: with what its backward pass recomputes settled.
      sync: how the reference moves, where it does.
      state_shardings: of each leaf of the state.
      state: shape, dtype and sharding of each leaf.
      frozen: shape, dtype and sharding of each weight that steps read and do not change.
      compiled: the jitted functions.
      has_totals: whether evaluation is told the totals of all its rows.
      num_shards: parts that a micro-batch is split into.
      adapters: weights of adapters that a token is multiplied with; None where all weights are trained.
    """

    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    sync: ReferenceSync | None
    state_shardings: TrainState
    state: TrainState
    frozen: Frozen
    compiled: Compiled
    has_totals: bool
    num_shards: int
    adapters: int | None = None

    def attention(self, length: int) -> str:
        """The backend that attends over packed sequences of so many places."""
        model = self.model
        settings = AttentionSettings(model.attention, model.attention_block_q, model.attention_block_kv)
        return settings.resolve(model.compute_dtype, model.config, length, model.config.layer_windows[0])

    def flops(self, batch: Batch) -> StepFlops:
        """Of a step, by its numpy arrays."""
        model = self.model
        program = Arithmetic(
            self.attention(batch.gather.shape[-1]) if isinstance(batch, PackedBatch) else "xla",
            model.remat,
            live_reference=self.frozen.reference is not None or self.sync is not None,
            first_pass=self.objective.coupled and num_micro(batch) > 1,
            num_shards=self.num_shards,
            block_q=model.attention_block_q,
            block_kv=model.attention_block_kv,
            on_cpu=jax.default_backend() == "cpu",
            adapters=self.adapters,
            adapters_in_reference=self.sync is not None or _has_adapters(self.frozen.reference),
        )
        return step_flops(model.config, batch, program)

    def lower_step(self, batch: Batch) -> Any:
        """The training step for batches of these shapes."""
        return self.compiled.train_step.lower(self.state, self.frozen, batch)

    def lower_evaluate(self, batch: Batch) -> Any:
        """The evaluation of batches of these shapes."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        totals = Totals(scalar, scalar) if self.has_totals else None
        frozen = self.evaluated(self.frozen, self.state)
        return self.compiled.evaluate.lower(self.state.params, frozen, batch, self.state.loss_state, totals)

    def evaluated(self, frozen: Frozen, state: TrainState) -> Frozen:
        """What an evaluation reads beside the params: of a reference that moves, where it is now."""
        return frozen if self.sync is None else frozen._replace(reference=state.reference_params)


def _adapters_met(setup: Setup) -> int | None:
    if setup.adaptation is None:
        return None
    moe = setup.model.config.moe
    return num_met_params(setup.adaptation.lora, moe.experts_per_token if moe else 1)


def _has_adapters(reference: Params) -> bool:
    return bool(reference) and not isinstance(reference, Weights)


def assemble(setup: Setup, *, reference: Mode, remat: str) -> Assembly:
    """Puts a run together.

    Args:
      reference: where its reference's log-probs come from.
      remat: what the backward pass recomputes.
    """
    config, task = setup.config, setup.task
    model = setup.model.clone(remat=remat)
    optimizer = make_optimizer(config, setup.num_steps)
    objective = task.objective(model, setup.mesh, packing=config.packing)
    sync = sync_of(config)
    shapes = setup.trained
    abstract = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=shapes,
        opt_state=jax.eval_shape(optimizer.init, shapes),
        rng=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(config.seed))),
        loss_state=jax.eval_shape(lambda: objective.init_state),
        reference_params=shapes if sync else None,
    )
    shardings: TrainState = state_shardings(abstract, shapes, setup.shardings, setup.mesh)
    if config.offload_optimizer:
        shardings = shardings._replace(opt_state=offloaded(shardings.opt_state, abstract.opt_state))
    state: TrainState = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    frozen = abstract_frozen(setup, live=reference == "live", moves=sync is not None)
    return Assembly(
        model=model,
        objective=objective,
        optimizer=optimizer,
        sync=sync,
        state_shardings=shardings,
        state=state,
        frozen=frozen,
        compiled=compile_step(
            objective=objective,
            optimizer=optimizer,
            schedule=learning_rate_schedule(config, setup.num_steps),
            mesh=setup.mesh,
            state_shardings=shardings,
            frozen_shardings=jax.tree.map(lambda leaf: leaf.sharding, frozen),
            sync=sync,
            lora=setup.adaptation.lora if setup.adaptation else None,
        ),
        has_totals=task.loss is not None,
        num_shards=num_batch_shards(setup.mesh),
        adapters=_adapters_met(setup),
    )


def sync_of(settings: object) -> ReferenceSync | None:
    """Returns how the reference moves, or None if it stays as it is or the settings have no reference."""
    if not isinstance(settings, ReferenceSettings) or not settings.sync_ref_model:
        return None
    return ReferenceSync(settings.ref_model_mixup_alpha, settings.ref_model_sync_steps)
