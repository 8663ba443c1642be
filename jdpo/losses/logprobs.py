"""From logits to log-probabilities of tokens and sequences.

Axes: t positions, v vocabulary; `...` any leading axes; of packed rows: r rows, s slots and k scored tokens of a row,
d model.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jdpo.losses.linear import linear_token_logps
from jdpo.losses.linear_chunks import num_scored, scored_states
from jdpo.types import AnyArray, PackedBatch

Array = jax.Array


def token_logps(logits: Array, targets: AnyArray) -> Array:
    """Computes the log-probability of each target token under its logits.

    Args:
      logits: float [..., v], of any float dtype. The log-softmax is computed in float32, or float64 for float64 logits.
      targets: int [...], ids in [0, v).

    Returns:
      float32 [...], natural logarithms, at most 0.

    Raises:
      ValueError: the leading shapes differ.

    >>> import jax.numpy as jnp
    >>> token_logps(jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])), jnp.array([1, 0])).round(3).tolist()
    [-0.28800..., -0.69300...]
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"expected targets of shape {logits.shape[:-1]} for logits {logits.shape}, found {targets.shape}"
        )
    # bfloat16 has 8 bits of precision: a logsumexp over a large vocabulary would lose most of its digits.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Gathered before the normalizer is subtracted: a log-softmax would be a second array of the logits' size.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_log_sum_sq(logits: Array) -> Array:
    """Computes log sum_v p_v^2 at each position, p = softmax(logits), which WPO (arXiv 2406.11827) aligns with.

    Args:
      logits: float [..., v].

    Returns:
      float32 [...] (float64 for float64 logits), between -log v and 0.

    >>> import jax.numpy as jnp
    >>> token_log_sum_sq(jnp.log(jnp.array([0.25, 0.75]))).round(3).item()     # log(1/16 + 9/16)
    -0.47...
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # log p_v = z_v - logsumexp(z), so the sum of squares needs no probability, which could underflow.
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)


def shifted_token_logps(logits: Array, tokens: AnyArray, completion_mask: AnyArray) -> tuple[Array, AnyArray]:
    """Computes the log-probability of each token of a sequence, as predicted by the position before it.

    The shift happens here and nowhere else. Logits at t predict the token at t+1, and the mask moves with the tokens,
    so the last position of the prompt predicts the first token of the completion.

        tokens           P0  P1  C0  C1  pad        P prompt, C completion
        completion_mask   0   0   1   1   0
        predicted        P1  C0  C1  pad            by positions 0, 1, 2, 3
        mask returned     0   1   1   0

    Args:
      logits: float [..., t, v].
      tokens: int [..., t].
      completion_mask: bool [..., t], True on completion tokens.

    Returns:
      (token_logps float32 [..., t-1], mask bool [..., t-1]).
    """
    return token_logps(logits[..., :-1, :], tokens[..., 1:]), completion_mask[..., 1:].astype(bool)


def sequence_logps(
    token_logps: Array,
    mask: AnyArray,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    ld_alpha: Array | float | None = None,
    shared_lengths: Array | None = None,
) -> Array:
    """Reduces token log-probabilities to one number per sequence, over the tokens where the mask is True.

    Args:
      token_logps: float [..., t]. Values where the mask is False are never read, not even NaN.
      mask: bool [..., t].
      reduction: "sum", or "mean" per token: 0 for a sequence without tokens; all tokens count, whatever their weight.
      ld_alpha: weight in [0, 1] of the tokens after the first `shared_lengths`; LD-DPO, arXiv 2409.06411.
      shared_lengths: int [...], the shorter length of each pair; required with ld_alpha.

            mask               0 1 1 1 0
            weight of a token  . 1 1 alpha .        shared_lengths 2

    Returns:
      float32 [...] (float64 for float64 log-probabilities), natural logarithms.

    Raises:
      ValueError: unknown reduction, shapes that differ, or one of ld_alpha and shared_lengths without the other.

    >>> import jax.numpy as jnp
    >>> logps, mask = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[False, True, True]])
    >>> sequence_logps(logps, mask).tolist(), sequence_logps(logps, mask, reduction="mean").tolist()
    ([-6.0], [-3.0])
    >>> sequence_logps(logps, mask, ld_alpha=0.5, shared_lengths=jnp.array([1])).tolist()
    [-4.0]
    """
    if token_logps.shape != mask.shape:
        raise ValueError(f"token_logps and mask must have the same shape, found {token_logps.shape} and {mask.shape}")
    if (ld_alpha is None) != (shared_lengths is None):
        raise ValueError("ld_alpha and shared_lengths belong together: give both or neither")
    mask = mask.astype(bool)
    # A sum over hundreds of tokens in bfloat16 would be off by whole nats.
    dtype = jnp.promote_types(token_logps.dtype, jnp.float32)
    # where, not a product: NaN * 0 is NaN, in the value and in the gradient.
    kept = jnp.where(mask, token_logps.astype(dtype), 0)
    if shared_lengths is not None:
        if shared_lengths.shape != mask.shape[:-1]:
            raise ValueError(f"shared_lengths must have the shape {mask.shape[:-1]}, found {shared_lengths.shape}")
        # The running count numbers the tokens of a completion from 1, wherever in the sequence it begins.
        is_shared = jnp.cumsum(mask, axis=-1) <= shared_lengths[..., None]
        kept = jnp.where(is_shared, kept, jnp.asarray(ld_alpha, dtype) * kept)
    total = kept.sum(-1)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / jnp.maximum(mask.sum(-1), 1).astype(dtype)
    raise ValueError(f"reduction must be 'sum' or 'mean', found {reduction!r}")


# --- packed rows


@overload
def packed_token_logps(
    outputs: Array,
    batch: PackedBatch,
    head: Array | None = ...,
    *,
    return_log_sum_sq: Literal[False] = ...,
    **options: Any,
) -> Array: ...
@overload
def packed_token_logps(
    outputs: Array, batch: PackedBatch, head: Array | None = ..., *, return_log_sum_sq: Literal[True], **options: Any
) -> tuple[Array, Array]: ...


def packed_token_logps(
    outputs: Array, batch: PackedBatch, head: Array | None = None, *, return_log_sum_sq: bool = False, **options: Any
) -> Any:
    """Computes the log-prob of each scored token of packed rows.

    Args:
      outputs: what the model gives for the slots: logits [m, s, v], or, with a head, hidden states [m, s, d], which is
        cheaper: only the states that predict a scored token meet the head, and in chunks.
      batch: arrays [m, ...] of a micro-batch.
      head: float [d, v], without a bias; None: outputs are logits.
      return_log_sum_sq: also return log sum_v p_v^2, which use_weighting needs.
      **options: chunk_size, logit_softcap and logit_scale of `linear_token_logps`, with a head only.

    Returns:
      float32 [m, c] (float64 for float64 outputs), natural logarithms; 0 after the last scored token of a row. With
      return_log_sum_sq, two such arrays.

    Raises:
      ValueError: shapes that do not match, or options without a head; see also `linear_token_logps`.
    """
    if outputs.ndim != 3 or outputs.shape[:2] != batch.tokens.shape:
        raise ValueError(
            f"expected logits [m, s, v] or hidden states [m, s, d] for batch.tokens {batch.tokens.shape}, found "
            f"{outputs.shape}"
        )
    scored, targets = scored_states(outputs, batch), jnp.asarray(batch.logp_target)
    counts = num_scored(batch)
    if head is not None:
        return linear_token_logps(scored, head, targets, lengths=counts, return_log_sum_sq=return_log_sum_sq, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: expected only with a head; logits are taken as they are")
    is_scored = jnp.arange(targets.shape[-1]) < counts[:, None]
    logps = jnp.where(is_scored, token_logps(scored, targets), 0)
    return (logps, jnp.where(is_scored, token_log_sum_sq(scored), 0)) if return_log_sum_sq else logps
