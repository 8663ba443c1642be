"""Token log-probs of packed rows: the model on flat slots, the head on scored tokens alone, in chunks.

Axes: r rows (split over the batch axes of the mesh), s slots of a row, k scored tokens of a row, d model, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jdpo.losses.linear_chunks import HeadSettings, row_token_logps
from jdpo.losses.pair_logps import LogpsFn, TokenScores
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.transformer import Transformer, apply_routed, variables
from jdpo.sharding.axes import BATCH_AXES, num_batch_shards
from jdpo.types import PackedBatch

Array = Any
Params = Any


def make_packed_logps(model: Transformer, mesh: Mesh) -> LogpsFn:
    """The one function behind policy and reference, training, evaluation and cache, on packed rows."""
    by_row, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    def logps(params: Params, batch: PackedBatch, with_log_sum_sq: bool) -> TokenScores:
        sequences = packed_sequences(batch.gather, batch.lengths, batch.scatter, batch.readers)
        inputs, method, router = (batch.tokens, batch.positions, sequences), "packed_hidden_and_head", None
        if model.config.moe is None:
            hidden_rsd, head_dv = model.apply(variables(params), *inputs, method=method)
        else:
            (hidden_rsd, head_dv), router = apply_routed(model, params, *inputs, method=method)
        hidden_rkd = jnp.take_along_axis(hidden_rsd, batch.logp_slot[..., None], axis=1)

        def head_logps(hidden_rkd: Array, head_dv: Array, targets_rk: Array, lengths_r: Array) -> Any:
            scale = model.config.logit_scale if model.config.logit_scale != 1.0 else None
            settings = HeadSettings(model.config.logit_softcap, scale, with_log_sum_sq)
            return row_token_logps(settings, hidden_rkd, head_dv, targets_rk, lengths_r.astype(jnp.int32))

        if num_batch_shards(mesh) > 1:  # XLA's partitioner fails on manual axes that are all of size 1
            # Within shard_map, so that the head's gradient is summed over devices once and not after every chunk.
            head_logps = jax.shard_map(
                head_logps,
                mesh=mesh,
                in_specs=(by_row, whole, by_row, by_row),
                out_specs=by_row,
                axis_names=set(BATCH_AXES),
            )
        # Scored tokens come first in a row, and behind the last one the head is not run.
        num_scored_r = (batch.logp_pair < batch.gather.shape[-2]).sum(-1)
        if mesh.size > num_batch_shards(mesh):  # devices that share the vocabulary talk to each other in every chunk:
            num_scored_r = jnp.full_like(num_scored_r, num_scored_r.max())  # all run as many
        found = head_logps(hidden_rkd, head_dv, batch.logp_target, num_scored_r)
        scores, log_sum_sq = found if with_log_sum_sq else (*found, None)
        return TokenScores(scores, log_sum_sq, router)

    return logps
