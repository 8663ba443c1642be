"""The steps of the ladder: the same rows, laid out and computed in six ways.

Axes: r rows, s slots of a row, k scored tokens of a row, d model, v vocabulary, p items of a row, b pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from speed_data import synthesize
from speed_model import ModelShape

from jdpo.data.batching.loader import bucket_length, collate_pairs
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import item_sizes, plan_run
from jdpo.losses.pair_logps import LogpsFn, PairFeatures, TokenScores, belongs, completion_sums
from jdpo.losses.pair_losses import Totals, packed_totals
from jdpo.losses.settings import loss_settings
from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.transformer import Transformer, init_params, make_apply_fn
from jdpo.training.step.objectives import Objective, PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import loss_and_grads
from jdpo.types import PackedBatch, TokenizedCompletion, TokenizedPair

BETA = 0.1

Array = Any
Params = Any


class Step(NamedTuple):
    """One way to compute a step.

    Attributes:
      function: operands -> (loss, gradients).
      operands: params, reference params or None, batch [k, m, ...].
      rows, places: of attention: rows of one or, where packed, several sequences, and places of each, padding included.
      tokens: real tokens of prompts, chosen and rejected.
    """

    function: Any
    operands: tuple[Any, ...]
    rows: int
    places: int
    tokens: int


def rungs(shape: ModelShape, lengths: np.ndarray, mesh: Any) -> dict[str, Step]:
    """Returns every rung by name, for the same rows and weights."""
    pairs = pairs_of(lengths, shape.vocab_size)
    plain, fast = model_of(shape, "xla"), model_of(shape, "auto")
    params, reference = (init_params(plain, jax.random.key(seed)) for seed in (0, 1))
    settings = loss_settings("sigmoid", beta=BETA)[0]
    apart, together = packed(sides_of(pairs)), packed(pairs)
    logps = PackedLogps(plain, mesh)
    cached = with_reference(together, reference, logps)
    padded = padded_batch(pairs, int(lengths[:, 0].max() + lengths[:, 1:].max()))
    fused = PreferenceObjective(logps, settings)
    ways: dict[str, tuple[Objective, Any, Any]] = {
        "padded": (PreferenceObjective(make_apply_fn(plain), settings), reference, padded),
        "packed": (SidesObjective(whole_head_logps(plain), settings, num_pairs=len(pairs)), reference, apart),
        "shared prompt": (PreferenceObjective(whole_head_logps(plain), settings), reference, together),
        "chunked head": (fused, reference, together),
        "cached reference": (fused, None, cached),
        "attention": (PreferenceObjective(PackedLogps(fast, mesh), settings), None, cached),
    }
    return {name: make_step(*way, params=params, tokens=int(lengths.sum())) for name, way in ways.items()}


def steps_of_growing_size(shape: ModelShape, lengths: np.ndarray, growth: Sequence[int], mesh: Any) -> list[Step]:
    """Returns the last rung on growing numbers of evenly spaced rows; the last of `growth` has all of them."""
    model = model_of(shape, "auto")
    params, reference = (init_params(model, jax.random.key(seed)) for seed in (0, 1))
    logps = PackedLogps(model, mesh)
    objective = PreferenceObjective(logps, loss_settings("sigmoid", beta=BETA)[0])
    steps = []
    by_length = lengths[np.argsort(lengths.sum(1), kind="stable")]
    for times in growth:
        size = len(lengths) * times // growth[-1]
        chosen = by_length[((np.arange(size) + 0.5) * len(lengths) / size).astype(int)]
        batch = with_reference(packed(pairs_of(chosen, shape.vocab_size)), reference, logps)
        steps.append(make_step(objective, None, batch, params=params, tokens=int(chosen.sum())))
    return steps


def make_step(objective: Objective, reference: Params, batch: Any, *, params: Params, tokens: int) -> Step:
    """Returns a step that computes loss and gradients as training does."""

    def function(params: Params, reference: Params, batch: Any) -> tuple[Array, Params]:
        found = loss_and_grads(objective, params, reference, batch)
        return found.loss, found.grads

    attended = batch.gather if isinstance(batch, PackedBatch) else batch.tokens
    *rows, places = attended.shape
    return Step(function, (params, reference, jax.tree.map(jnp.asarray, batch)), math.prod(rows), places, tokens)


def model_of(shape: ModelShape, attention: str) -> Transformer:
    """Returns the decoder in float32, without rematerialization."""
    config = ModelConfig(
        family="llama",
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        d_ff=shape.d_ff,
        norm_eps=1e-6,
        tie_embeddings=shape.tied,
        qkv_bias=False,
        o_bias=False,
        layers=(LayerKind(rope=RopeConfig(theta=1e4)),) * shape.num_layers,
        max_positions=4096,
    )
    return Transformer(config, attention=attention, remat="none")


# --- rows


def pairs_of(lengths: np.ndarray, vocab_size: int) -> list[TokenizedPair]:
    return [
        TokenizedPair(*(np.array(ids, np.int32) for ids in row), f"row {index}")
        for index, row in enumerate(synthesize(lengths, vocab_size))
    ]


def sides_of(pairs: Sequence[TokenizedPair]) -> list[TokenizedCompletion]:
    """Returns chosen and rejected of each pair as separate consecutive rows, each with its prompt."""
    sides = []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            mask = np.arange(len(pair.prompt_ids) + len(completion)) >= len(pair.prompt_ids)
            sides.append(TokenizedCompletion(np.concatenate([pair.prompt_ids, completion]), mask, pair.origin))
    return sides


def packed(rows: Any) -> PackedBatch:
    """Packs all rows, in order, into one row of slots, and their sequences back to back into attention rows."""
    indices, sizes = np.arange(len(rows)), item_sizes(rows)
    plan = plan_run(sizes, [indices], num_shards=1, micro_batch_size=len(rows), sequences_per_row=None)
    return pack_step(rows, indices, plan.step(indices))


def padded_batch(pairs: Sequence[TokenizedPair], max_length: int) -> Any:
    """Returns a padded batch [1, b, 2, t] with the t of `packing: false`."""
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    length = bucket_length(longest, max_length)
    batch = collate_pairs(pairs, num_slots=len(pairs), length=length, pad_token_id=0)
    return jax.tree.map(lambda array: array[None], batch)


def with_reference(batch: PackedBatch, reference: Params, logps: LogpsFn) -> PackedBatch:
    """Returns the batch with the reference's log-probs, as from the cache."""
    micro = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
    found = jax.jit(lambda params, micro: logps(params, micro, False)[0])(reference, micro)
    return batch._replace(logp_reference=np.asarray(found)[None])


# --- the rungs that jdpo has no switch for


def whole_head_logps(model: Transformer) -> LogpsFn:
    """Computes `PackedLogps` with the head on every slot at once, which holds logits [r, s, v]."""

    def logps(params: Params, batch: PackedBatch, with_log_sum_sq: bool) -> TokenScores:
        assert not with_log_sum_sq
        sequences = packed_sequences(batch.gather, batch.lengths, batch.scatter, batch.readers)
        hidden_rsd, head_dv = model.apply(
            {"params": params}, batch.tokens, batch.positions, sequences, method="packed_hidden_and_head"
        )
        logits_rsv = hidden_rsd @ head_dv
        norm_rs = jax.nn.logsumexp(logits_rsv, axis=-1)
        row = jnp.arange(logits_rsv.shape[0])[:, None]
        return TokenScores(logits_rsv[row, batch.logp_slot, batch.logp_target] - norm_rs[row, batch.logp_slot])

    return logps


@dataclasses.dataclass(frozen=True)
class SidesObjective(PreferenceObjective):
    """The preference loss over batches of `sides_of`: items 2 i and 2 i + 1 are the sides of pair i."""

    num_pairs: int = 0

    def features(self, params: Params, reference_params: Params, batch: Any, base: Any = None) -> PairFeatures:
        of_item = belongs(batch.logp_pair, batch.pair_weight.shape[-1])

        def sums(values: Array) -> Array:
            return completion_sums(values, of_item, num_sides=1).reshape(self.num_pairs, 2)

        policy = sums(self.run(params, batch, False)[0])
        frozen = jax.lax.stop_gradient(sums(self.run(jax.lax.stop_gradient(reference_params), batch, False)[0]))
        lengths = sums(jnp.ones_like(batch.logp_pair))
        return PairFeatures(policy, None, frozen, None, lengths, None, jnp.ones(self.num_pairs, policy.dtype))

    def totals(self, batch: Any) -> Totals:
        return packed_totals(batch)._replace(normalizer=jnp.float32(self.num_pairs))
