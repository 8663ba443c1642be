"""Token log-probs of packed rows: the model on flat slots, the head on scored tokens alone, in chunks.

Axes: r rows (split over the batch axes of the mesh), s slots of a row, k scored tokens of a row, d model, v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jdpo.losses.linear import linear_token_logps
from jdpo.losses.objective import LogpsFn
from jdpo.models.packed import packed_sequences
from jdpo.models.transformer import Transformer
from jdpo.sharding.mesh import BATCH_AXES
from jdpo.types import PackedBatch

Array = Any
Params = Any


def make_packed_logps(model: Transformer, mesh: Mesh) -> LogpsFn:
    """The one function behind policy and reference, training, evaluation and cache, on packed rows."""
    by_row, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    def logps(params: Params, batch: PackedBatch, with_log_sum_sq: bool) -> tuple[Array, Array | None]:
        sequences = packed_sequences(batch.gather, batch.lengths, batch.scatter, batch.readers)
        hidden_rsd, head_dv = model.apply(
            {"params": params}, batch.tokens, batch.positions, sequences, method="packed_hidden_and_head"
        )
        hidden_rkd = jnp.take_along_axis(hidden_rsd, batch.logp_slot[..., None], axis=1)
        # Within shard_map, so that the head's gradient is summed over devices once and not after every chunk.
        head_logps = jax.shard_map(
            partial(linear_token_logps, return_log_sum_sq=with_log_sum_sq),
            mesh=mesh,
            in_specs=(by_row, whole, by_row),
            out_specs=by_row,
            axis_names=set(BATCH_AXES),
        )
        found = head_logps(hidden_rkd, head_dv, batch.logp_target)
        return found if with_log_sum_sq else (found, None)

    return logps
