"""The objectives of a training step: from weights and a batch to features of rows, and from features to losses.

Axes: k micro-batches one after the other, m rows of a micro-batch, b = k m. Packed: r rows, split over the batch axes
of the mesh, s slots of a row, k scored tokens of a row, d model, v vocabulary.
A batch is a NamedTuple of arrays [k, m, ...]; among its features, `weights` [m] are 0 on padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jdpo.devices import target
from jdpo.losses.coupled import init_loss_state
from jdpo.losses.linear_chunks import HeadSettings, num_scored, row_token_logps, scored_states
from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
from jdpo.losses.pair_logps import PairFeatures, TokenScores, belongs, completion_sums, packed_features, pair_features
from jdpo.losses.pair_losses import Totals, feature_losses, next_loss_state, packed_totals, pair_totals
from jdpo.losses.router import of_real_rows
from jdpo.losses.settings import LossSettings
from jdpo.models.lora.adapters import Lora, weights_of
from jdpo.models.lora.base_weights import Base
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.transformer import Transformer, Weights, apply_routed, variables
from jdpo.sharding.axes import BATCH_AXES, num_batch_shards
from jdpo.sharding.rules import partition_spec
from jdpo.training.step.head_chunks import head_chunk_tokens, max_kept_logits
from jdpo.types import CompletionBatch, PackedBatch, PreferenceBatch, Routed, RouterStats

Array = jax.Array
Params = Any
Batch = Any
Features = Any


# --- the preference objective


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """The mean preference loss over the real pairs of the global batch.

    It comes in two halves, since a loss may need all pairs of a global batch whose parts the models see one after the
    other: `features` runs the models on a micro-batch, `losses` reads the features of all micro-batches.

    Attributes:
      run: how a model reads a batch: `PackedLogps` for packed rows, a function (params, tokens, attention_mask) ->
        logits for padded ones.
      settings: the losses and their options.
      router_aux_loss_coef: factor of the router's load balancing loss, over all real tokens of the global batch, in the
        loss of a step; None: the model has no router.
      lora: the adapters, where they alone are trained; `features` then needs the base that they belong to.
    """

    run: Callable[..., Any]
    settings: LossSettings
    router_aux_loss_coef: float | None = None
    lora: Lora | None = None

    def features(
        self, params: Params, reference_params: Params, batch: PackedBatch | PreferenceBatch, base: Base | None = None
    ) -> PairFeatures:
        """Runs policy and reference on a micro-batch.

        Args:
          reference_params: None where the batch carries the reference's log-probs, or no loss has a reference.
          batch: arrays [m, ...].
        """
        # Inside the function that is differentiated, so that gradients reach the adapters and not the base.
        params, reference_params = with_base(self.lora, base, params, reference_params)
        if isinstance(batch, PackedBatch):
            return packed_features(params, reference_params, batch, logps_fn=self.run, settings=self.settings)
        return pair_features(params, reference_params, batch, apply_fn=self.run, settings=self.settings)

    def totals(self, batch: PackedBatch | PreferenceBatch) -> Totals:
        """Counts what losses read of a global batch, arrays [k, m, ...]."""
        return packed_totals(batch) if isinstance(batch, PackedBatch) else pair_totals(batch)

    def losses(self, features: PairFeatures, totals: Totals, loss_state: Any) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of each row, [b], and the metrics of each row, {name: [b]}, without gradients."""
        return feature_losses(features, totals, settings=self.settings, loss_state=loss_state)

    def next_state(self, features: PairFeatures, loss_state: Any) -> Any:
        """Returns the loss state of the next step, from the features of the global batch; None where there is none."""
        if not self.settings.bco_running_delta:
            return None
        return next_loss_state(features, settings=self.settings, loss_state=loss_state)

    @property
    def init_state(self) -> Any:
        """The loss state of the first step; None where no loss has one."""
        return init_loss_state() if self.settings.bco_running_delta else None

    @property
    def learnt(self) -> tuple[str, ...]:
        """Names of the features that depend on the trained params."""
        return ("policy_logps", "policy_ld_logps", *(["router"] if self.router_aux_loss_coef else []))

    @property
    def coupled(self) -> bool:
        """True if a row's loss depends on other rows of the global batch, as a router's load balancing loss does."""
        return self.settings.needs_global_batch or bool(self.router_aux_loss_coef)


# --- the supervised objective


class CompletionFeatures(NamedTuple):
    """The features of supervised rows, [m] each.

    Attributes:
      logps: summed completion log-probs.
      weights: 0 on padding.
      router: what the router did with the tokens of each row, for models with experts.
    """

    logps: Array
    weights: Array
    router: RouterStats | None = None


class CompletionTotals(NamedTuple):
    """The real completion tokens of the global batch, a scalar, over which the loss is a mean."""

    normalizer: Array


@dataclasses.dataclass(frozen=True)
class CompletionObjective:
    """The mean negative log-likelihood over the completion tokens of the global batch.

    Attributes: as of `PreferenceObjective`, whose methods it has.
    """

    run: Callable[..., Any]
    router_aux_loss_coef: float | None = None
    lora: Lora | None = None

    def features(
        self, params: Params, reference_params: Params, batch: PackedBatch | CompletionBatch, base: Base | None = None
    ) -> CompletionFeatures:
        """Runs the model on a micro-batch, arrays [m, ...]; `reference_params` is None."""
        params, _ = with_base(self.lora, base, params, reference_params)
        if isinstance(batch, PackedBatch):
            token_logps, _, router = self.run(params, batch, False)  # [r, k]
            of_completion = belongs(batch.logp_pair, batch.pair_weight.shape[-1])
            sums = completion_sums(token_logps, of_completion, num_sides=1)  # [r, p, 1]
            return CompletionFeatures(sums.reshape(-1), jnp.asarray(batch.pair_weight).reshape(-1), router)
        output = self.run(params, batch.tokens, batch.attention_mask)
        logits, router = output if isinstance(output, Routed) else (output, None)
        if router is not None:
            router = of_real_rows(router, batch.weights > 0)
        logps = sequence_logps(*shifted_token_logps(logits, batch.tokens, batch.completion_mask))
        return CompletionFeatures(logps, jnp.asarray(batch.weights), router)

    def totals(self, batch: PackedBatch | CompletionBatch) -> CompletionTotals:
        """Counts the completion tokens of a global batch, arrays [k, m, ...]."""
        if isinstance(batch, PackedBatch):
            real = batch.logp_pair < batch.pair_weight.shape[-1]
            return CompletionTotals(real.sum().astype(batch.pair_weight.dtype))
        # The token at position 0 has nothing before it that could predict it.
        real = batch.completion_mask[..., 1:] & (batch.weights > 0)[..., None]
        return CompletionTotals(real.sum().astype(batch.weights.dtype))

    def losses(
        self, features: CompletionFeatures, totals: CompletionTotals, loss_state: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of each row, [b], and {"loss": [b]} without its gradient."""
        # Sums and not means per row: the normalizer counts tokens of the global batch.
        return -features.logps, {"loss": jax.lax.stop_gradient(-features.logps)}

    def next_state(self, features: CompletionFeatures, loss_state: Any) -> Any:
        """Returns `loss_state`: likelihood has no running state."""
        return loss_state

    @property
    def init_state(self) -> Any:
        """None: likelihood has no running state."""
        return None

    @property
    def learnt(self) -> tuple[str, ...]:
        """Names of the features that depend on the trained params."""
        return ("logps", *(["router"] if self.router_aux_loss_coef else []))

    @property
    def coupled(self) -> bool:
        """True if the router's load balancing loss, a product of two means over the global batch, is trained."""
        return bool(self.router_aux_loss_coef)


Objective = PreferenceObjective | CompletionObjective


# --- running the model


def with_base(
    lora: Lora | None, base: Base | None, params: Params, reference_params: Params
) -> tuple[Params | Weights, Params | Weights]:
    """Returns policy and reference as the model runs on them: adapters joined with the base that they belong to.

    Args:
      lora: None: all weights are trained; `params` and `reference_params` are returned as they are.
      reference_params: adapters (none at all, {}, for the base alone), or Weights of a model of its own, or None.
    """
    if lora is None:
        return params, reference_params
    assert base is not None
    # Weights of a model of its own are complete; adapters, also none at all, need the base.
    on_base = reference_params is not None and not isinstance(reference_params, Weights)
    reference = weights_of(lora, base, reference_params) if on_base else reference_params
    return weights_of(lora, base, params), reference


class ScoredStates(NamedTuple):
    """The inputs of the head for the scored tokens of packed rows.

    Attributes:
      hidden: float [r, k, d], the states that predict the scored tokens, which come first in each row.
      head: float [d, v].
      num_scored: int [r], the scored tokens of each row.
      router: counts of the routers, for a model with experts.
    """

    hidden: Array
    head: Array
    num_scored: Array
    router: RouterStats | None


class PackedLogps:
    """Log-probs of the scored tokens of packed rows: the model on flat slots, the head on scored tokens alone.

    Policy and reference, training, evaluation and the reference cache all use it, so that they agree to the last bit.
    """

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.model, self.mesh, self.num_shards = model, mesh, num_batch_shards(mesh)
        config, kind, on_cpu = model.config, mesh.devices.flat[0].device_kind, target().platform == "cpu"
        self._head_settings = HeadSettings(
            config.logit_softcap,
            # None leaves the multiplication out of the program.
            config.logit_scale if config.logit_scale != 1.0 else None,
            with_sum_sq=False,
            by_token=on_cpu and config.tie_embeddings,
            by_index=on_cpu and mesh.size == self.num_shards,  # no device has a part of the vocabulary
        )
        self._min_chunk_tokens = head_chunk_tokens(kind, model.compute_dtype, config.vocab_size)
        self._max_kept_logits = max_kept_logits(kind)
        self._head_spec = partition_spec(("embed", None), (config.d_model, config.vocab_size), mesh)

    def __call__(self, params: Params | Weights, batch: PackedBatch, with_log_sum_sq: bool) -> TokenScores:
        """Returns scores [r, k] of `batch.logp_target`; of rows [r, ...] of one micro-batch."""
        hidden_rkd, head_dv, num_scored_r, router = self.scored_states(params, batch)
        targets_rk = jnp.asarray(batch.logp_target)
        logps, *log_sum_sq = self._head(hidden_rkd, head_dv, targets_rk, num_scored_r, with_log_sum_sq)
        return TokenScores(logps, log_sum_sq[0] if log_sum_sq else None, router)

    def scored_states(self, params: Params | Weights, batch: PackedBatch) -> ScoredStates:
        """Runs the model on a micro-batch up to its head; arguments as for `__call__`."""
        sequences = packed_sequences(batch.gather, batch.lengths, batch.scatter, batch.readers)
        inputs, method, router = (batch.tokens, batch.positions, sequences), "packed_hidden_and_head", None
        if self.model.config.moe is None:
            hidden_rsd, head_dv = self.model.apply(variables(params), *inputs, method=method)
        else:
            (hidden_rsd, head_dv), router = apply_routed(self.model, params, *inputs, method=method)
        # Only hidden states that predict a learnt token meet the head, the largest matrix of the model.
        hidden_rkd = scored_states(hidden_rsd, batch)
        # The head is not run after the last scored token.
        num_scored_r = num_scored(batch)
        if self.mesh.size > self.num_shards:
            # Devices that share the vocabulary talk to each other in every chunk, so all must run as many chunks.
            num_scored_r = jnp.full_like(num_scored_r, num_scored_r.max())
        return ScoredStates(hidden_rkd, head_dv, num_scored_r, router)

    def _head(
        self, hidden_rkd: Array, head_dv: Array, targets_rk: Array, num_scored_r: Array, with_log_sum_sq: bool
    ) -> tuple[Array, ...]:
        settings = self._head_settings._replace(with_sum_sq=with_log_sum_sq)

        def of_rows(hidden_rkd: Array, head_dv: Array, targets_rk: Array, num_scored_r: Array) -> tuple[Array, ...]:
            keeps_logits = targets_rk.size * head_dv.shape[1] <= self._max_kept_logits
            return row_token_logps(
                settings._replace(keeps_logits=keeps_logits),
                hidden_rkd,
                head_dv,
                targets_rk,
                num_scored_r.astype(jnp.int32),
                chunk=targets_rk.shape[1] if keeps_logits else None,
                min_tokens=self._min_chunk_tokens,
            )

        context = jax.sharding.get_abstract_mesh()
        # Within a shard_map over copies of the weights, see `accumulate`, the other axes are left.
        mesh: Any = context if context.manual_axes else self.mesh
        axes = tuple(axis for axis in BATCH_AXES if axis not in context.manual_axes)
        # XLA's partitioner fails on manual axes that are all of size 1.
        if all(mesh.shape[axis] == 1 for axis in axes):
            return of_rows(hidden_rkd, head_dv, targets_rk, num_scored_r)
        by_row, split = PartitionSpec(axes), self._head_spec[0]
        copied = tuple(axis for axis in axes if axis not in (split if isinstance(split, tuple) else (split,)))

        def on_device(hidden_rkd: Array, part_of_head: Array, targets_rk: Array, num_scored_r: Array) -> Any:
            # Marked before it is gathered, so that its gradient is first summed and divided among the devices that hold
            # parts of the head, and then summed over the copies: across slices go parts, and not the whole gradient.
            part_of_head = jax.lax.pcast(part_of_head, copied, to="varying") if copied else part_of_head
            return of_rows(hidden_rkd, _gathered(part_of_head, split), targets_rk, num_scored_r)

        # Within shard_map, so that the head is gathered, and its gradient summed over devices, once and not after every
        # chunk.
        over_mesh: Callable[..., tuple[Array, ...]] = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(by_row, self._head_spec, by_row, by_row),
            out_specs=by_row,
            axis_names=set(axes),
        )
        return over_mesh(hidden_rkd, head_dv, targets_rk, num_scored_r)


def _gathered(part: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns the whole of an array whose first dim is split over mesh axes; call it within `jax.shard_map`."""
    for axis in reversed((axes,) if isinstance(axes, str) else axes or ()):
        part = jax.lax.all_gather(part, axis, axis=0, tiled=True)
    return part
