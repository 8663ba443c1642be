"""The step and the evaluation of a run, jitted over the mesh, and the shapes of the state that they work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jdpo.config import ReferenceSettings
from jdpo.devices import target
from jdpo.losses.pair_losses import Totals
from jdpo.models.lora.adapters import num_active_params
from jdpo.models.self_attention import AttentionSettings
from jdpo.models.transformer import Transformer, Weights
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.placement import micro_batch_sharding, offloaded, replicated, state_shardings
from jdpo.training.fit.compiler_options import Value, compiler_options
from jdpo.training.fit.flops import Arithmetic, StepFlops, step_flops
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.validation import Mode
from jdpo.training.setup.weight_placement import abstract_frozen
from jdpo.training.step.head_chunks import head_chunk_tokens, max_kept_logits
from jdpo.training.step.objectives import Batch, Objective
from jdpo.training.step.optimizer import learning_rate_schedule, make_optimizer
from jdpo.training.step.train_step import Frozen, ReferenceSync, TrainState, evaluate, num_micro, train_step
from jdpo.types import PackedBatch

Params = Any


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
    options: Mapping[str, Value] | None = None,
) -> Compiled:
    """Jits step and evaluation over the mesh: explicit in and out shardings, the old state donated.

    jax.jit with in_shardings and out_shardings is what pjit was.

    Args:
      frozen_shardings: of the weights that steps read next to the state.
      options: of the compiler.
    """
    # Part of the jitted functions, so that trial compilations, the cache of programs and the steps have the same.
    given = dict(options or {})
    batch_sharding, whole = micro_batch_sharding(mesh), replicated(mesh)
    params_sharding = state_shardings.params
    # A reference that moves is sharded as the params, and takes the place of the frozen one in evaluations.
    evaluated = frozen_shardings if sync is None else frozen_shardings._replace(reference=params_sharding)
    # What is fixed for a run is bound here, so that jax sees only state, frozen weights and batch.
    step = partial(
        train_step, objective=objective, optimizer=optimizer, schedule=schedule, shardings=params_sharding, sync=sync
    )
    return Compiled(
        OnMesh(
            mesh,
            jax.jit(
                step,
                in_shardings=(state_shardings, frozen_shardings, batch_sharding),
                # Reports are whole on every device, so that each process reads them without asking another.
                out_shardings=(state_shardings, whole),
                donate_argnums=0,  # the new state takes the memory of the old one
                compiler_options=given,
            ),
        ),
        OnMesh(
            mesh,
            jax.jit(
                # Nothing is donated: training continues with the params that were evaluated.
                partial(evaluate, objective=objective),
                in_shardings=(params_sharding, evaluated, batch_sharding, whole, whole),
                out_shardings=whole,
                compiler_options=given,
            ),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """The programs of a run under one remat policy, before anything is computed.

    Attributes:
      setup: the run.
      model: with its remat policy.
      sync: how the reference moves; None where it is frozen for good.
      state: shape, dtype and sharding of each leaf.
      frozen: shape, dtype and sharding of each weight that steps read and do not change.
      options: of the compiler, as far as it takes them.
      compiled: the jitted functions.
    """

    setup: Setup
    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    sync: ReferenceSync | None
    state: TrainState
    frozen: Frozen
    options: Mapping[str, Value]
    compiled: Compiled

    @property
    def state_shardings(self) -> TrainState:
        """The sharding of each leaf of the state."""
        shardings: TrainState = shardings_of(self.state)
        return shardings

    @property
    def has_totals(self) -> bool:
        """True if evaluation is told the totals of all its rows, which preference losses read."""
        return self.setup.task.loss is not None

    def with_remat(self, remat: str) -> Assembly:
        """Returns the same programs under another remat policy; state and frozen weights keep their shapes."""
        model = self.model.clone(remat=remat)
        objective = objective_of(self.setup, model)
        compiled = compile_step(
            objective=objective,
            optimizer=self.optimizer,
            schedule=learning_rate_schedule(self.setup.config, self.setup.num_steps),
            mesh=self.setup.mesh,
            state_shardings=self.state_shardings,
            frozen_shardings=shardings_of(self.frozen),
            sync=self.sync,
            options=self.options,
        )
        return dataclasses.replace(self, model=model, objective=objective, compiled=compiled)

    def attention(self, length: int) -> str:
        """Returns the backend that attends over packed sequences of up to this many positions."""
        model = self.model
        settings = AttentionSettings(model.attention, model.attention_block_q, model.attention_block_kv)
        return settings.resolve(model.compute_dtype, model.config, length, next(iter(model.config.windows), None))

    def flops(self, batch: Batch) -> StepFlops:
        """Counts the FLOPs of a step from its batch of numpy arrays."""
        model, reference, device = self.model, self.frozen.reference, self.setup.mesh.devices.flat[0]
        program = Arithmetic(
            # Padded rows attend by plain XLA, whatever backend packed rows have.
            self.attention(batch.gather.shape[-1]) if isinstance(batch, PackedBatch) else "xla",
            model.remat,
            live_reference=reference is not None or self.sync is not None,
            first_pass=self.objective.coupled and num_micro(batch) > 1,
            num_shards=num_batch_shards(self.setup.mesh),
            block_q=model.attention_block_q,
            block_kv=model.attention_block_kv,
            on_cpu=target().platform == "cpu",
            head_chunk_tokens=head_chunk_tokens(device.device_kind, model.compute_dtype, model.config.vocab_size),
            max_kept_logits=max_kept_logits(device.device_kind),
            adapters=_active_adapter_params(self.setup),
            adapters_in_reference=self.sync is not None or (bool(reference) and not isinstance(reference, Weights)),
        )
        return step_flops(model.config, batch, program)

    def lower_step(self, batch: Batch) -> Any:
        """Lowers the training step for batches of these shapes."""
        return self.compiled.train_step.lower(self.state, self.frozen, batch)

    def lower_evaluate(self, batch: Batch) -> Any:
        """Lowers the evaluation of batches of these shapes."""
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        totals = Totals(scalar, scalar) if self.has_totals else None
        # With the shapes of the reference in the state, where it moves.
        frozen = self.evaluated(self.frozen, self.state)
        return self.compiled.evaluate.lower(self.state.params, frozen, batch, self.state.loss_state, totals)

    def evaluated(self, frozen: Frozen, state: TrainState) -> Frozen:
        """Returns the weights that an evaluation reads next to the params: a moving reference where it is now."""
        return frozen if self.sync is None else frozen._replace(reference=state.reference_params)


def assemble(setup: Setup, *, reference: Mode, remat: str) -> Assembly:
    """Builds the programs of a run. Nothing is traced except for shapes, nothing is compiled.

    Args:
      reference: where the reference's log-probs come from.
      remat: what the backward pass recomputes.
    """
    config = setup.config
    # Only shapes from here on: arrays of a large model would not fit one host.
    model = setup.model.clone(remat=remat)
    optimizer, objective = make_optimizer(config, setup.num_steps), objective_of(setup, model)
    sync = sync_of(config)
    shapes = setup.trained
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    abstract = TrainState(
        step=step,
        params=shapes,
        opt_state=jax.eval_shape(optimizer.init, shapes),
        rng=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(config.seed))),
        loss_state=jax.eval_shape(lambda: objective.init_state),
        reference_params=shapes if sync else None,
    )
    # Moments are split as their weights; scalars are on every device.
    shardings: TrainState = state_shardings(abstract, shapes, setup.shardings, setup.mesh)
    if config.offload_optimizer:
        shardings = shardings._replace(opt_state=offloaded(shardings.opt_state, abstract.opt_state))
    state: TrainState = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    frozen = abstract_frozen(setup, live=reference == "live", moves=sync is not None)
    options = compiler_options(setup.mesh, config.compiler_options)
    compiled = compile_step(
        objective=objective,
        optimizer=optimizer,
        schedule=learning_rate_schedule(config, setup.num_steps),
        mesh=setup.mesh,
        state_shardings=shardings,
        frozen_shardings=shardings_of(frozen),
        sync=sync,
        options=options,
    )
    return Assembly(
        setup=setup,
        model=model,
        objective=objective,
        optimizer=optimizer,
        sync=sync,
        state=state,
        frozen=frozen,
        options=options,
        compiled=compiled,
    )


def objective_of(setup: Setup, model: Transformer) -> Objective:
    """Returns what a run minimises."""
    config, lora = setup.config, setup.adaptation.lora if setup.adaptation else None
    return setup.task.objective(
        model, setup.mesh, packing=config.packing, router_aux_loss_coef=config.router_aux_loss_coef, lora=lora
    )


def sync_of(settings: object) -> ReferenceSync | None:
    """Returns how the reference moves, or None if it stays as it is or the settings have no reference."""
    if not isinstance(settings, ReferenceSettings) or not settings.sync_ref_model:
        return None
    return ReferenceSync(settings.ref_model_mixup_alpha, settings.ref_model_sync_steps)


def shardings_of(shapes: Any) -> Any:
    """Returns the sharding of each leaf of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _active_adapter_params(setup: Setup) -> int | None:
    if setup.adaptation is None:
        return None
    moe = setup.model.config.moe
    return num_active_params(setup.adaptation.lora, moe.experts_per_token if moe else 1)
