"""Log-probs of rows under one model, and divergences of two, by the packed rows and the functions of training.

Axes: b pairs, f completions, t tokens of a completion; r rows of a micro-batch, k scored tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jdpo.data.batching.packing_plan import item_sizes
from jdpo.data.prepared.prepared_data import PreparedData
from jdpo.losses.divergence import ModelHead, token_divergences
from jdpo.losses.linear_chunks import HeadSettings
from jdpo.models.transformer import Transformer
from jdpo.sharding.axes import BATCH_AXES, num_batch_shards
from jdpo.training.reference.packed_scoring import (
    PackedScorer,
    over_micro_batches,
    packed_logps,
    score_completions,
    score_pairs,
    sides_of_rows,
)
from jdpo.training.step.objectives import PackedLogps
from jdpo.types import AnyPair, PackedBatch, TokenizedCompletion

Progress = Callable[[int], None]
"""Called after each batch with its number of rows."""


class OnDevice(Protocol):
    """A model with its weights on a mesh, as `jdpo.load` returns it."""

    @property
    def model(self) -> Transformer: ...
    @property
    def params(self) -> Any: ...
    @property
    def mesh(self) -> Mesh: ...


def pair_logps(loaded: OnDevice, data: PreparedData[AnyPair], progress: Progress) -> np.ndarray:
    """Returns the summed log-probs of both completions of each pair, float64 [b, 2].

    Raises:
      FloatingPointError: a log-prob is not finite; its row is named.
    """
    scorer = PackedScorer(
        packed_logps(loaded.model, loaded.mesh), loaded.mesh, lambda: loaded.params, model=loaded.model
    )
    part = range(len(data))
    scored = score_pairs(scorer, scorer.plan(data, data.sizes(), [part]), part, progress)
    # In float64, since figures are small differences of large sums.
    return np.array([[values.sum(dtype=np.float64) for values in sides] for sides in scored])


def completion_logps(loaded: OnDevice, rows: Sequence[TokenizedCompletion], progress: Progress) -> np.ndarray:
    """Returns the summed log-prob of each completion, float64 [f]; errors as for `pair_logps`."""
    scorer = PackedScorer(
        packed_logps(loaded.model, loaded.mesh), loaded.mesh, lambda: loaded.params, model=loaded.model
    )
    part = range(len(rows))
    scored = score_completions(scorer, scorer.plan(rows, item_sizes(rows), [part]), part, progress)
    return np.array([values.sum(dtype=np.float64) for values in scored])


class Divergences(NamedTuple):
    """Divergences in nats of the next token at each token of a completion, float [t] each.

    Attributes:
      forward: KL(first || second).
      backward: KL(second || first).
    """

    forward: np.ndarray
    backward: np.ndarray


def completion_divergences(
    first: OnDevice, second: OnDevice, rows: Sequence[TokenizedCompletion], progress: Progress
) -> list[Divergences]:
    """Computes exact divergences at the completion tokens of each row. Both models are on the device.

    Raises:
      ValueError: the vocabularies differ.
    """
    if first.model.config.vocab_size != second.model.config.vocab_size:
        raise ValueError(
            f"a divergence needs one vocabulary; the models have {first.model.config.vocab_size} and "
            f"{second.model.config.vocab_size} tokens"
        )
    function = _packed_divergences(first.model, second.model, first.mesh)
    scorer = PackedScorer(function, first.mesh, lambda: (first.params, second.params), model=first.model)
    part, sizes = range(len(rows)), item_sizes(rows)
    found: dict[int, Divergences] = {}
    for indices, batch, both in scorer.run(scorer.plan(rows, sizes, [part]), part):
        forward, backward = (sides_of_rows(rows, batch, values, num_sides=1) for values in both)
        for index, (_, (of_first,)) in forward.items():
            found[index] = Divergences(of_first, backward[index][1][0])
        progress(len(indices))
    return [found[row] for row in part]


@functools.lru_cache(maxsize=2)
def _packed_divergences(first: Transformer, second: Transformer, mesh: Mesh) -> Callable[[Any, PackedBatch], Any]:
    """Returns the compiled function ((first's, second's weights), batch [k, m, ...]) -> two arrays [k, m, c]."""
    models = [PackedLogps(model.clone(remat="none"), mesh) for model in (first, second)]

    def of_micro(weights: tuple[Any, Any], batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
        states = [model.scored_states(own, batch) for model, own in zip(models, weights, strict=True)]

        def of_rows(hidden: list[jax.Array], heads: list[jax.Array], lengths: jax.Array) -> tuple[jax.Array, ...]:
            settings = (_head_settings(model.model) for model in models)
            one, other = (ModelHead(*parts) for parts in zip(hidden, heads, settings, strict=True))
            return token_divergences(one, other, lengths)

        if num_batch_shards(mesh) > 1:  # as in `PackedLogps`: each device loops over its own rows
            by_row, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
            of_rows = jax.shard_map(
                of_rows,
                mesh=mesh,
                in_specs=(by_row, whole, by_row),
                out_specs=by_row,
                axis_names=set(BATCH_AXES),
            )
        lengths = states[0].num_scored.astype(jnp.int32)
        forward, backward = of_rows([one.hidden for one in states], [one.head for one in states], lengths)
        return forward, backward

    return over_micro_batches(of_micro, mesh)


def _head_settings(model: Transformer) -> HeadSettings:
    config = model.config
    return HeadSettings(config.logit_softcap, config.logit_scale if config.logit_scale != 1.0 else None, False)
