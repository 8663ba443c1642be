"""The LM head applied to rows of hidden states in chunks: a loop over positions with its own backward pass.

Axes: r rows, k positions of a row, d model, v vocabulary, c positions of a row in one chunk, m chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jdpo.types import PackedBatch

Array = jax.Array

CHUNK_BYTES = 48 * 2**20
"""Maximum size of the logits of a chunk, if the caller does not choose the size of chunks..."""
MIN_CHUNK_TOKENS = 256
"""... and the minimum number of tokens, which takes precedence: smaller chunks spend more time on reading weights. On
GPUs and TPUs that is so below 700 to 2300 tokens."""


class HeadSettings(NamedTuple):
    """Static settings of the head; hashable.

    Attributes:
      by_token: products read the head as [v, d], a row for each token. XLA's CPU backend multiplies faster so, and
        copies nothing where the head is the transpose of a token table; elsewhere XLA chooses layouts by itself.
      by_index: the target's logit is read at its index, which needs the vocabulary on one device. Without, it is a sum
        over the vocabulary with zeros elsewhere, which XLA's CPU backend writes to memory first.
      keeps_logits: the backward pass reads the logits [r, k, v] of the forward pass, and does not compute them again.
    """

    softcap: float | None
    scale: float | None
    with_sum_sq: bool
    by_token: bool = False
    by_index: bool = False
    keeps_logits: bool = False


def row_token_logps(
    settings: HeadSettings,
    hidden_rkd: Array,
    head: Array,
    targets_rk: Array,
    lengths_r: Array | None = None,
    *,
    chunk: int | None = None,
    min_tokens: int = MIN_CHUNK_TOKENS,
) -> tuple[Array, ...]:
    """Computes the log-probs of the targets of rows through the head: `linear_token_logps` without its checks.

    Call it on the arrays of one device (within shard_map), or on whole arrays that GSPMD partitions.

    Args:
      chunk: maximum positions of each row per chunk; None: that of `default_chunk`.
      min_tokens: of `default_chunk`.

    Returns:
      see `chunked_token_logps`.
    """
    rows, positions = targets_rk.shape
    chunk = chunk or default_chunk(rows, positions, head.shape[1], skips=lengths_r is not None, min_tokens=min_tokens)
    chunk = max(min(chunk, positions), 1)
    counts = [] if lengths_r is None else [lengths_r]
    hidden_rkd, head, targets_rk, *counts = varying_alike(hidden_rkd, head, targets_rk, *counts)
    return chunked_token_logps(chunk, settings, hidden_rkd, head, targets_rk, counts[0] if counts else None)


def scored_states(values_rsd: Array, batch: PackedBatch) -> Array:
    """Selects the slots that predict a scored token, [r, s, d] -> [r, k, d]; arbitrary after the last one of a row."""
    return jnp.take_along_axis(values_rsd, batch.logp_slot[..., None], axis=1)


def num_scored(batch: PackedBatch) -> Array:
    """Returns int [r], the number of scored tokens of each row, which come first."""
    return jnp.asarray(scored_mask(batch)).sum(-1)


def scored_mask(batch: PackedBatch) -> Any:
    """Returns bool [..., k], True for scored tokens and False for the padding after them."""
    # n sides of p items have the numbers below n * p.
    return batch.logp_pair < batch.readers.shape[-2] * batch.pair_weight.shape[-1]


def default_chunk(
    rows: int, positions: int, vocabulary: int, *, skips: bool = False, min_tokens: int = MIN_CHUNK_TOKENS
) -> int:
    """Returns the positions of a row per chunk, according to CHUNK_BYTES and `min_tokens`; at most half of them.

    Args:
      skips: chunks may be skipped; they are then smaller, so that more of them can be.
      min_tokens: minimum tokens of a chunk, of all rows together, which takes precedence over CHUNK_BYTES.
    """
    # 4 bytes per logit, which is float32 whatever the weights are. At least two chunks, so that the logits of all
    # positions never exist together.
    tokens, most = max(CHUNK_BYTES // (4 * vocabulary), min_tokens), -(-positions // 2)
    if skips:
        most = min(most, max(-(-positions // 4), min_tokens // max(rows, 1)))
    return max(min(tokens // max(rows, 1), most), 1)


def varying_alike(*arrays: Array) -> list[Array]:
    """Marks each array as varying over the manual mesh axes that any of them varies over.

    Within jax.shard_map, all devices share the head while their rows differ. The transpose of this mark sums the
    gradient of the head over devices: once, after the last chunk.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[str]().union(*varying)
    return [
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def _chunks(array: Array, chunk: int) -> Array:
    """Reshapes [r, k, ...] to [r, m, c, ...] with c at most `chunk`, and zeros after the last position."""
    positions = array.shape[1]
    number = max(-(-positions // chunk), 1)
    length = max(-(-positions // number), 1)  # even: 10 positions by at most 8 are 5 + 5, without padding
    padding = [(0, number * length - positions if axis == 1 else 0) for axis in range(array.ndim)]
    return rearrange(jnp.pad(array, padding), "r (m c) ... -> r m c ...", c=length)


def over_chunks(
    body: Any, total: Any, arrays: tuple[Array, ...], chunk: int, lengths: Array | None
) -> tuple[Any, tuple[Array, ...]]:
    """Runs `body` over chunks of the second axis of `arrays` [r, k, ...], without moving the first axis.

    Args:
      body: (total, is_counted bool [r, c] or None, *chunks [r, c, ...]) -> (total, results [r, c, ...]).
      lengths: int [r]; chunks after the longest are not run, and their results are 0. A single chunk always is.
    """
    positions = arrays[0].shape[1]
    chunked = tuple(_chunks(array, chunk) for array in arrays)
    number, length = chunked[0].shape[1:3]

    def run(index: Any, total: Any) -> tuple[Any, tuple[Array, ...]]:
        # Indexing inside the loop, not lax.scan: a scan needs its axis first, and moving it copies every hidden state.
        chunks = (jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False) for x in chunked)
        counted = None if lengths is None else index * length + jnp.arange(length) < lengths[:, None]
        new_total, results = body(total, counted, *chunks)
        return new_total, results

    def step(index: Any, state: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
        total, results = run(index, state[0])
        updates = zip(state[1], results, strict=True)
        return total, [jax.lax.dynamic_update_slice_in_dim(x, new, index * length, axis=1) for x, new in updates]

    if number == 1:  # without the loop, which would start from zeros and copy what it carries
        total, results = run(0, total)
        return total, tuple(x[:, :positions] for x in results)
    # Results are written into arrays of their final size, since a loop can only update what it is given.
    shapes = jax.eval_shape(run, 0, total)[1]
    empty = [jnp.zeros((x.shape[0], number * length, *x.shape[2:]), x.dtype) for x in shapes]
    # What a loop carries must vary over the same mesh axes before and after each pass.
    empty = [varying_alike(x, *arrays)[0] for x in empty]
    # A dynamic bound: chunks without a position that counts cost nothing.
    in_use = number if lengths is None else jnp.minimum((lengths.max(initial=0) + length - 1) // length, number)
    total, results = jax.lax.fori_loop(0, in_use, step, (total, empty))
    # The last chunk may have padding after the last position.
    return total, tuple(x[:, :positions] for x in results)


def kept(values: Array, counted: Array | None) -> Array:
    """Returns values [r, c, ...], with 0 where they do not count."""
    if counted is None:
        return values
    return jnp.where(counted.reshape(counted.shape + (1,) * (values.ndim - 2)), values, 0)


def _dot(equation: str, left: Array, right: Array) -> Array:
    """Computes a matrix product in the operands' dtype, accumulated and returned in float32 or wider."""
    dtype = jnp.promote_types(jnp.promote_types(left.dtype, right.dtype), jnp.float32)
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _oriented(settings: HeadSettings, head: Array) -> Array:
    """Returns the head as products read it; called outside the loops, whose inputs XLA keeps in the order of axes."""
    return head.T if settings.by_token else head


def head_logits(settings: HeadSettings, hidden_rcd: Array, head: Array) -> Array:
    """Returns the logits [r, c, v], float32 or wider; the head is [v, d] if `settings.by_token`, else [d, v]."""
    logits_rcv = _dot("rcd,vd->rcv" if settings.by_token else "rcd,dv->rcv", hidden_rcd, head)
    if settings.scale is not None:
        logits_rcv = logits_rcv * settings.scale
    if settings.softcap is not None:
        logits_rcv = settings.softcap * jnp.tanh(logits_rcv / settings.softcap)
    return logits_rcv


def _target_logits(settings: HeadSettings, logits_rcv: Array, targets_rc: Array) -> Array:
    if settings.by_index:
        return jnp.take_along_axis(logits_rcv, targets_rc[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(_is_target(targets_rc, logits_rcv.shape[-1]), logits_rcv, 0).sum(-1)


def _is_target(targets_rc: Array, vocabulary: int) -> Array:
    # A comparison, not a gather or scatter, because the vocabulary may be sharded.
    return targets_rc[..., None] == jnp.arange(vocabulary)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_token_logps(
    chunk: int, settings: HeadSettings, hidden_rkd: Array, head: Array, targets_rk: Array, lengths_r: Array | None
) -> tuple[Array, ...]:
    """Computes log-probs of targets under softmax(hidden @ head), with the logits [r, c, v] of one chunk at a time.

    The backward pass computes the logits again, chunk by chunk, from the log-sum-exp [r, k] of the forward pass; unless
    `settings.keeps_logits`.

    Args:
      chunk: c, the maximum number of positions of a row per chunk.
      hidden_rkd, head: [r, k, d] and [d, v]. Their cotangents have their dtypes, and are summed in float32 or wider.
      targets_rk: int [r, k]; no cotangent.
      lengths_r: int [r], positions of each row that count; None: all. The others give 0 and have no gradient, and
        chunks in which no position counts are not run.

    Returns:
      log p of each target [r, k] and, if `settings.with_sum_sq`, log sum_v p_v^2 [r, k]; float32 or wider. Both are
      differentiable.
    """
    return _forward(chunk, settings, hidden_rkd, head, targets_rk, lengths_r)[0]


def _forward(
    chunk: int, settings: HeadSettings, hidden_rkd: Array, head: Array, targets_rk: Array, lengths_r: Array | None
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    oriented = _oriented(settings, head)

    def body(total: None, counted_rc: Any, hidden_rcd: Array, targets_rc: Array) -> tuple[None, tuple[Array, ...]]:
        logits = head_logits(settings, kept(hidden_rcd, counted_rc), oriented)  # [r, c, v]
        highest = logits.max(-1)  # subtracted, so that exp cannot overflow
        weights = jnp.exp(logits - highest[..., None])
        log_sum = jnp.log(weights.sum(-1))
        target_logit = _target_logits(settings, logits, targets_rc)
        # `highest` cancels: both terms are smaller by twice its value.
        log_sum_sq = [jnp.log(jnp.square(weights).sum(-1)) - 2 * log_sum] if settings.with_sum_sq else []
        results = (target_logit - highest - log_sum, highest + log_sum, *log_sum_sq)
        # Logits that do not count are those of hidden states of 0.
        return total, (*(kept(x, counted_rc) for x in results), *([logits] if settings.keeps_logits else []))

    _, (logps, log_sum_exp, *more) = over_chunks(body, None, (hidden_rkd, targets_rk), chunk, lengths_r)
    logits_rkv = [more.pop()] if settings.keeps_logits else []
    return (logps, *more), (hidden_rkd, head, targets_rk, lengths_r, logits_rkv, log_sum_exp, *more)


def _backward(
    chunk: int, settings: HeadSettings, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, None, None]:
    """Uses d logp / dz = onehot - p and d log_sum_sq / dz = 2 (p^2 / sum p^2 - p), with p the softmax of logits z."""
    hidden_rkd, head, targets_rk, lengths_r, logits_rkv, *per_token = residuals
    oriented = _oriented(settings, head)

    def body(
        d_head: Array, counted_rc: Any, hidden_rcd: Array, targets_rc: Array, *per_token_rc: Any
    ) -> tuple[Array, tuple[Array]]:
        # Cleared although the gradient of these positions is 0: in the product for the head, 0 * NaN would be NaN.
        hidden_rcd = kept(hidden_rcd, counted_rc)
        if settings.keeps_logits:
            logits, per_token_rc = per_token_rc[-1], per_token_rc[:-1]
        else:
            logits = head_logits(settings, hidden_rcd, oriented)
        log_sum_exp, g_logps, *sum_sq = (kept(x, counted_rc)[..., None] for x in per_token_rc)
        # With the normalizer of the forward pass, which saves a reduction over the vocabulary.
        log_p = logits - log_sum_exp
        p = jnp.exp(log_p)
        d_logits = g_logps * (_is_target(targets_rc, head.shape[1]) - p)
        if settings.with_sum_sq:
            log_sum_sq, g_sum_sq = sum_sq
            d_logits += 2 * g_sum_sq * (jnp.exp(2 * log_p - log_sum_sq) - p)
        if settings.softcap is not None:
            # The derivative of tanh is 1 - tanh^2, and the logits are softcap * tanh already.
            d_logits *= 1 - jnp.square(logits / settings.softcap)
        if settings.scale is not None:
            d_logits *= settings.scale
        # Both products in the dtype of the operands: float32 next to bfloat16 would make them slow.
        d_logits = d_logits.astype(jnp.promote_types(hidden_rcd.dtype, head.dtype))
        equation = "rcv,vd->rcd" if settings.by_token else "rcv,dv->rcd"
        d_hidden = _dot(equation, d_logits, oriented).astype(hidden_rcd.dtype)
        return d_head + _dot("rcd,rcv->dv", hidden_rcd, d_logits), (d_hidden,)

    log_sum_exp, *log_sum_sq = per_token
    g_logps, *g_sum_sq = cotangents
    # Summed in float32 at least: in bfloat16, the contribution of a late chunk would be rounded away.
    zeros = jnp.zeros_like(head, dtype=jnp.promote_types(head.dtype, jnp.float32))
    arrays = (hidden_rkd, targets_rk, log_sum_exp, g_logps, *log_sum_sq, *g_sum_sq, *logits_rkv)
    d_head, (d_hidden,) = over_chunks(body, zeros, arrays, chunk, lengths_r)
    # Targets and lengths are integers, which have no cotangents.
    return d_hidden, d_head.astype(head.dtype), None, None


chunked_token_logps.defvjp(_forward, _backward)
