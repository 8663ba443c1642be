"""Counts the FLOPs of a training step: those that the mathematics needs, and those that the program executes.

Only matrix products count: 2 FLOPs per weight and token forward, 4 backward. N is the number of weights in the layers'
matrices (of experts, those that a token is sent to), h = d V in the head, L the number of layers, H the heads of width
K. A prompt P with its chosen C and rejected R takes

    logical     6 N (P + C + R) + 6 h (C + R) + 12 L H K pairs     nothing repeated, no padding
    executed    the same for all slots, positions and chunks that the program runs, padding included, and what it
                computes again: the head's logits (8 h) unless they are kept, attention's scores, and what remat drops

where pairs are pairs of a query and a key that it sees, each prompt once. Layers with a DeltaNet have no pairs; their
delta rule adds 18 k v FLOPs for each token and value head, of widths k and v, to the logical ones, and what its chunks
multiply to the executed ones. A live reference adds a forward pass to both:
2 N (P + C + R) + 2 h (C + R) + 4 L H K pairs.

Frozen weights get no gradient: with adapters of M weights, 6 N and 6 h become 4 N and 4 h, and 6 M (P + C + R) is
added.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jdpo.losses.linear_chunks import MIN_CHUNK_TOKENS, default_chunk, scored_mask
from jdpo.models.attention.work import PRODUCTS, causal_pairs, computed_pairs
from jdpo.models.delta.delta_work import RuleProducts, projection_width, rule_products, value_width
from jdpo.models.model_config import ModelConfig
from jdpo.types import REJECTED, CompletionBatch, PackedBatch, PreferenceBatch


class StepFlops(NamedTuple):
    """FLOPs of a whole step, over all devices."""

    logical: float
    executed: float


class Arithmetic(NamedTuple):
    """The properties of a program that determine how much it multiplies.

    Attributes:
      backend: of attention over packed rows, resolved: not "auto".
      remat: "none" or a name of `REMAT_POLICIES`.
      live_reference: True if a frozen model runs in the step.
      first_pass: True if the policy runs an additional forward pass first, for a loss that couples rows.
      num_shards: parts that a micro-batch is split into.
      block_q, block_kv: tile sizes, where the config gives them.
      on_cpu: True if it runs on CPUs.
      head_chunk_tokens: minimum tokens of a shard that meet the head at once.
      max_kept_logits: logits of a shard up to which they are made in one chunk, and not computed again.
      adapters: M, weights of adapters that each token is multiplied with; None where all weights are trained.
      adapters_in_reference: True if the frozen model has adapters, too.
    """

    backend: str
    remat: str
    live_reference: bool = False
    first_pass: bool = False
    num_shards: int = 1
    block_q: int | None = None
    block_kv: int | None = None
    on_cpu: bool = True
    head_chunk_tokens: int = MIN_CHUNK_TOKENS
    max_kept_logits: int = 0
    adapters: int | None = None
    adapters_in_reference: bool = False


class _Amounts(NamedTuple):
    """Tokens in the layers, in the head, in experts and in delta rules, and pairs of attention over all layers."""

    tokens: int
    scored: int
    pairs: int
    routed: int  # padding goes to no expert
    mixed: int  # a prompt is in the sequence of each of its answers


_ONE_TOKEN = _Amounts(tokens=1, scored=1, pairs=1, routed=1, mixed=1)


def step_flops(config: ModelConfig, batch: Any, program: Arithmetic) -> StepFlops:
    """Counts the FLOPs of a step.

    Executed attention is counted in the backend's tiles; those of cuDNN are assumed to be of 128. A head that a mesh
    splits over several devices counts as a whole one. Executed FLOPs leave out everything but matrix products, and the
    padding of the blocks in which experts multiply, as the router determines it.

    Args:
      batch: numpy arrays [k, m, ...] of the whole step: a PackedBatch, a PreferenceBatch or a CompletionBatch.
    """
    if isinstance(batch, PackedBatch):
        real, run = _packed_real(config, batch), _packed_run(config, batch, program)
        products, logits_again = PRODUCTS[program.backend], not _keeps_logits(config, batch, program)
    else:
        real, run = _padded_real(config, batch), _padded_run(config, batch)
        products, logits_again = PRODUCTS["xla"], False
    reference = int(program.live_reference)
    # Forward, and backward for activations; the third is the gradient of the weights, which frozen ones do not have.
    passes = 3 if program.adapters is None else 2
    logical = _flops(config, real, matrices=passes + reference, head=passes + reference, products=6 + 2 * reference)
    # Passes that compute no gradients.
    forwards = reference + int(program.first_pass)
    products_run = products.forward * (1 + forwards) + products.backward + _products_again(program.remat, products)
    executed = _flops(
        config, run, matrices=passes + forwards, head=passes + logits_again + forwards, products=products_run
    )
    # _again counts multiplications; each comes with an addition.
    executed += 2.0 * _again(config, program.remat, run)
    length = batch.gather.shape[-1] if isinstance(batch, PackedBatch) else batch.tokens.shape[-1]
    logical += 2.0 * (3 + reference) * _rule_products(config, length).needed * real.mixed
    executed += 2.0 * _rule_products_run(config, length, program.remat, forwards) * run.mixed
    of_adapters = 2.0 * (program.adapters or 0)
    in_reference = int(program.live_reference and program.adapters_in_reference)
    # Under dots the outputs of matrix products are kept, so none is multiplied again.
    again = int(program.remat not in ("none", "dots"))
    return StepFlops(
        logical + of_adapters * (3 + in_reference) * real.tokens,
        executed + of_adapters * (3 + in_reference + int(program.first_pass) + again) * run.tokens,
    )


class _Matrices(NamedTuple):
    """Weights of the layers' matrices: those of all tokens, and those of the experts that a token is sent to."""

    shared: int
    experts: int

    def products(self, amounts: _Amounts) -> int:
        """Returns the multiplications of one pass."""
        return self.shared * amounts.tokens + self.experts * amounts.routed


def _matrices(config: ModelConfig) -> _Matrices:
    # Query, output and a gate; key and value.
    heads = (2 + config.attention_gate) * config.num_heads + 2 * config.num_kv_heads
    maps, num_dense = 2 + config.gated_mlp, _num_dense(config)  # up and down, and a gate
    num_attention = len(config.layer_windows)
    shared = num_attention * heads * config.head_dim + num_dense * maps * config.d_ff
    if config.delta is not None:
        shared += config.num_delta_layers * (projection_width(config.delta) + value_width(config.delta))
    if config.moe is None:
        return _Matrices(config.d_model * shared, 0)
    num_sparse = config.num_layers - num_dense
    shared += num_sparse * config.moe.num_experts  # routers
    if config.moe.shared_d_ff is not None:
        shared += num_sparse * (3 * config.moe.shared_d_ff + 1)  # its maps and its score
    return _Matrices(
        config.d_model * shared, config.d_model * num_sparse * config.moe.experts_per_token * 3 * config.moe.d_ff
    )


def layer_products(config: ModelConfig) -> float:
    """Returns the weights of all layers that a token is multiplied with."""
    return _matrices(config).products(_ONE_TOKEN)


def products_again(config: ModelConfig, remat: str) -> float:
    """Returns how many of these multiplications the backward pass repeats for each token."""
    return _again(config, remat, _ONE_TOKEN)


def _num_dense(config: ModelConfig) -> int:
    return sum(kind.mlp == "dense" for kind in config.layers)


def _flops(config: ModelConfig, amounts: _Amounts, *, matrices: int, head: int, products: int) -> float:
    """FLOPs where each matrix, the head and each pair are multiplied this many times."""
    of_layers = matrices * _matrices(config).products(amounts)
    of_head = head * config.d_model * config.vocab_size * amounts.scored
    return 2.0 * (of_layers + of_head + products * config.num_heads * config.head_dim * amounts.pairs)


def _again(config: ModelConfig, remat: str, run: _Amounts) -> int:
    """Multiplications that the backward pass repeats.

    The last matrix of a layer is not repeated, as no gradient needs its output, except that of experts, which the
    gradients of their weights in the sum need.
    """
    if remat in ("none", "dots"):
        return 0
    products = _matrices(config).products(run)
    if config.norm_placement != "before":  # the gradient of a norm after the last matrix needs its output
        return products
    last = _num_dense(config) * config.d_ff
    if config.parallel_residual:
        last += len(config.layer_windows) * config.num_heads * config.head_dim
    return products - last * config.d_model * run.tokens


def _rule_products(config: ModelConfig, length: int) -> RuleProducts:
    """Multiplications of the delta rule per token, in all layers that have one."""
    if config.delta is None:
        return RuleProducts(0, 0, 0)
    return RuleProducts(*(config.num_delta_layers * products for products in rule_products(config.delta, length)))


def _rule_products_run(config: ModelConfig, length: int, remat: str, forwards: int) -> int:
    """Multiplications per place of these rules in a step.

    Args:
      forwards: passes that compute no gradients.
    """
    products = _rule_products(config, length)
    # No policy but "none" keeps what its gradient reads.
    return (1 + forwards + (remat != "none")) * products.forward + products.backward


def _products_again(remat: str, products: Any) -> int:
    """Attention's products that the backward pass repeats, in addition to those that the backend always repeats."""
    if remat == "none":
        return 0
    return int(products.repeated if remat in ("dots", "attention") else products.forward)


# --- packed rows


def _packed_real(config: ModelConfig, batch: PackedBatch) -> _Amounts:
    used, scored = _used(batch), scored_mask(batch)
    num_used = int(used.sum())
    pairs = _pairs_at(config, np.asarray(batch.positions)[used])
    return _Amounts(num_used, int(scored.sum()), pairs, num_used, num_used)


def _used(batch: PackedBatch) -> np.ndarray:
    """Returns bool [k, m, s], True for slots that hold a token."""
    used: np.ndarray = np.any(batch.readers < np.prod(batch.gather.shape[-2:]), axis=-2)
    return used


def _keeps_logits(config: ModelConfig, batch: PackedBatch, program: Arithmetic) -> bool:
    """Returns True if the head runs in one chunk, whose logits the backward pass reads."""
    tokens = math.prod(batch.logp_pair.shape[1:]) // program.num_shards
    return tokens * config.vocab_size <= program.max_kept_logits


def _packed_run(config: ModelConfig, batch: PackedBatch, program: Arithmetic) -> _Amounts:
    length, num_scored = batch.gather.shape[-1], batch.logp_pair.shape[-1]
    # Attention is called once per shard and micro-batch, and its tiles depend on the rows of that call.
    num_rows, attention_rows, per_row = batch.lengths.shape[1:]
    calls = batch.lengths.reshape(-1, num_rows // program.num_shards * attention_rows, per_row)
    pairs = sum(
        computed_pairs(
            program.backend,
            lengths,
            length,
            num_heads=config.num_heads,
            window=window,
            block_q=program.block_q,
            block_kv=program.block_kv,
            on_cpu=program.on_cpu,
        )
        * config.layer_windows.count(window)
        for window in set(config.layer_windows)
        for lengths in calls
    )
    rows = batch.logp_pair.shape[1] // program.num_shards
    scored = scored_mask(batch).sum(-1).reshape(-1, rows)  # of each call's rows
    tokens = program.head_chunk_tokens
    chunk = min(default_chunk(rows, num_scored, config.vocab_size, skips=True, min_tokens=tokens), num_scored)
    chunk = -(-num_scored // -(-num_scored // chunk))  # chunks are even
    num_scored_run = int((-(-scored.max(1) // chunk)).sum()) * chunk * rows
    if _keeps_logits(config, batch, program):  # in one chunk, which always runs
        num_scored_run = batch.logp_pair.size
    return _Amounts(batch.tokens.size, num_scored_run, pairs, int(_used(batch).sum()), batch.gather.size)


# --- padded rows


def _padded_real(config: ModelConfig, batch: PreferenceBatch | CompletionBatch) -> _Amounts:
    mask, completion = (np.array(array, bool) for array in (batch.attention_mask, batch.completion_mask))
    if batch.weights is not None:  # padding rows hold a token, which attention needs
        mask &= (batch.weights > 0).reshape(*batch.weights.shape, *[1] * (mask.ndim - batch.weights.ndim))
    scored = int((completion & mask)[..., 1:].sum())
    if isinstance(batch, PreferenceBatch):
        mask[..., REJECTED, :] &= completion[..., REJECTED, :]  # the prompt counts once, on the chosen side
    positions = np.broadcast_to(np.arange(mask.shape[-1]), mask.shape)[mask]
    num_used = int(mask.sum())
    return _Amounts(num_used, scored, _pairs_at(config, positions), num_used, num_used)


def _padded_run(config: ModelConfig, batch: PreferenceBatch | CompletionBatch) -> _Amounts:
    tokens = batch.tokens.size
    # XLA's attention multiplies every query with every key, also with those that the mask then hides.
    pairs = tokens * batch.tokens.shape[-1] * len(config.layer_windows)
    return _Amounts(tokens, tokens, pairs, int(np.sum(batch.attention_mask)), tokens)


def _pairs_at(config: ModelConfig, positions: np.ndarray) -> int:
    """Pairs over all layers of queries at `positions`."""
    return sum(
        causal_pairs(positions, window) * config.layer_windows.count(window) for window in set(config.layer_windows)
    )
