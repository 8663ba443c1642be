"""Computes log-probs of pairs from models: the first half of the preference objective.

The second half is `jdpo.losses.pair_losses`. They are separate because a loss may need the log-probs of a global batch,
while the models run on one part of it at a time. The `stop_gradient` of the reference is in this file and nowhere else.

Axes: b pairs, n=2 (chosen, rejected), t positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jdpo.losses.argument_checks import check_batch, check_scores
from jdpo.losses.logprobs import sequence_logps, shifted_token_logps, token_log_sum_sq
from jdpo.losses.router import of_real_rows
from jdpo.losses.settings import LossSettings
from jdpo.types import AnyArray, PackedBatch, PreferenceBatch, Routed, RouterStats

Array = jax.Array
Params = Any
ApplyFn = Callable[[Params, Array, Array], Array | Routed]


class TokenScores(NamedTuple):
    """Scores of tokens under a model.

    Attributes:
      logps: log-probs, float32 or wider.
      log_sum_sq: log sum_v p_v^2 in the same shape, or None if not requested.
      router: counts of the routers, for a model with experts.
    """

    logps: Array
    log_sum_sq: Array | None = None
    router: RouterStats | None = None


LogpsFn = Callable[[Params, PackedBatch, bool], TokenScores]


def pair_token_logps(params: Params, batch: PreferenceBatch, *, apply_fn: ApplyFn) -> Array:
    """Computes the log-prob of every completion token of both sides.

    Policy and reference, training and evaluation all use this function, so that they agree bitwise.

    Args:
      params: parameters of the model.
      batch: tokens and masks [b, 2, t].
      apply_fn: (params, tokens [n, t], attention_mask [n, t]) -> logits [n, t, v], or `Routed(logits, router)` for a
        model with experts whose router is trained as well.

    Returns:
      float32 [b, 2, t]; the value at t is that of the token at t, and 0 outside completions.
    """
    return _token_scores(params, batch, apply_fn, with_log_sum_sq=False).logps


def _token_scores(params: Params, batch: PreferenceBatch, apply_fn: ApplyFn, *, with_log_sum_sq: bool) -> TokenScores:
    """Scores every completion token, [b, 2, t], 0 elsewhere; the counts of routers are per sequence, (b n)."""
    num_pairs = batch.tokens.shape[0]
    # (b n) keeps a pair's two sides on the shard that holds the pair; (n b) would cross shards.
    flat_tokens, flat_attention, flat_completion = (
        rearrange(jnp.asarray(array), "b n t -> (b n) t")
        for array in (batch.tokens, batch.attention_mask, batch.completion_mask)
    )
    output = apply_fn(params, flat_tokens, flat_attention)
    logits, router = output if isinstance(output, Routed) else (output, None)
    if getattr(logits, "shape", ())[:-1] != flat_tokens.shape:
        raise ValueError(
            f"apply_fn must return logits [n, t, v] for tokens {flat_tokens.shape}, found "
            f"{getattr(logits, 'shape', type(logits).__name__)}"
        )
    logps, mask = shifted_token_logps(logits, flat_tokens, flat_completion)  # [(b n), t-1]

    def to_pairs(values: Array) -> Array:
        at_tokens = jnp.pad(jnp.where(mask, values, 0), ((0, 0), (1, 0)))  # the token at 0 is never predicted
        return rearrange(at_tokens, "(b n) t -> b n t", b=num_pairs)

    log_sum_sq = to_pairs(token_log_sum_sq(logits[:, :-1])) if with_log_sum_sq else None
    return TokenScores(to_pairs(logps), log_sum_sq, router)


class PairFeatures(NamedTuple):
    """Everything that losses and metrics read about pairs.

    Attributes:
      policy_logps: float [b, 2], log-probs summed over the completion. Gradients flow only through this field, the next
        one and `router`.
      policy_ld_logps: float [b, 2], the same with the weights of LD-DPO; None without ld_alpha.
      reference_logps, reference_ld_logps: the same under the reference, or None.
      lengths: int [b, 2], number of completion tokens that are predicted.
      pair_weights: float [b], the weights of WPO, or None.
      weights: float [b], 0 for padding pairs.
      router: counts of the policy's routers over real tokens, per row or sequence, for a model with experts.
      score_margins: float [b], above 0, if the loss reads scores, else None.
    """

    policy_logps: Array
    policy_ld_logps: Array | None
    reference_logps: Array | None
    reference_ld_logps: Array | None
    lengths: Array
    pair_weights: Array | None
    weights: Array
    router: RouterStats | None = None
    score_margins: Array | None = None


def pair_features(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch,
    *,
    apply_fn: ApplyFn,
    settings: LossSettings,
) -> PairFeatures:
    """Runs the models on a padded batch; see `dpo_loss` for arguments and errors."""
    check_batch(batch)
    mask = predicted_tokens(batch)  # [b, 2, t]
    lengths = mask.sum(-1)  # [b, 2]
    weights = jnp.ones(mask.shape[0], jnp.float32) if batch.weights is None else jnp.asarray(batch.weights)
    # Padding pairs are masked before anything is computed from them: NaN * 0 is NaN, in gradients as well.
    reduce = partial(
        _sums, mask=mask & (weights > 0)[:, None, None], lengths=lengths, ld_alpha=settings.ld_alpha, real=weights > 0
    )
    token_logps, log_sum_sq, router = _token_scores(
        policy_params, batch, apply_fn, with_log_sum_sq=settings.use_weighting
    )
    if router is not None:
        # Routers count per sequence, in the order (b n): the two sides of a pair are neighbours.
        router = of_real_rows(router, jnp.repeat(weights > 0, 2))
    reference: tuple[Array | None, Array | None] = (None, None)
    if settings.needs_reference:
        reference = reduce(_reference_token_logps(reference_params, batch, apply_fn, settings))
    pair_weights = None
    if log_sum_sq is not None:
        # A constant of the loss: with a gradient, the policy could lower the loss by lowering the weight itself.
        aligned = sequence_logps(jax.lax.stop_gradient(token_logps - log_sum_sq), mask, reduction="mean")
        # The weights of the two sides are multiplied: their logs are added.
        pair_weights = jnp.exp(aligned.sum(-1))
    scores = _score_margins(batch.score_margins, weights, token_logps.dtype) if settings.needs_scores else None
    weights = weights.astype(token_logps.dtype)
    return PairFeatures(*reduce(token_logps), *reference, lengths, pair_weights, weights, router, scores)


def packed_features(
    policy_params: Params,
    reference_params: Params | None,
    batch: PackedBatch,
    *,
    logps_fn: LogpsFn,
    settings: LossSettings,
) -> PairFeatures:
    """Computes `pair_features` of packed rows, for (r p) pairs. The numbers do not depend on the packing.

    Args:
      batch: PackedBatch of [r, ...] arrays.
      logps_fn: (params, batch, with_log_sum_sq) -> scores [r, k] of batch.logp_target, router counts per row.
    """
    num_pairs = batch.pair_weight.shape[-1]
    of_completion = belongs(batch.logp_pair, 2 * num_pairs)  # [r, k, c]
    lengths = completion_sums(jnp.ones_like(batch.logp_pair), of_completion)
    policy, log_sum_sq, router = logps_fn(policy_params, batch, settings.use_weighting)
    tail = None if settings.ld_alpha is None else tail_weights(of_completion, lengths, settings.ld_alpha, policy.dtype)

    def reduce(logps: Array) -> tuple[Array, Array | None]:
        plain = _pairs_first(completion_sums(logps, of_completion))
        return plain, None if tail is None else _pairs_first(completion_sums(tail * logps, of_completion))

    reference: tuple[Array | None, Array | None] = (None, None)
    if settings.needs_reference:
        if (reference_params is None) == (batch.logp_reference is None):
            raise _reference_error(settings, "batch.logp_reference", reference_params)
        given: Any = batch.logp_reference
        if reference_params is not None:
            # Stopped at the params already, so that no activation of this pass is kept for a backward pass.
            given = logps_fn(jax.lax.stop_gradient(reference_params), batch, False).logps
        reference = reduce(jax.lax.stop_gradient(given))
    pair_weights = None
    if log_sum_sq is not None:
        aligned = completion_sums(jax.lax.stop_gradient(policy - log_sum_sq), of_completion)
        pair_weights = jnp.exp((_pairs_first(aligned) / jnp.maximum(_pairs_first(lengths), 1)).sum(-1))
    weights, scores = jnp.asarray(batch.pair_weight).reshape(-1), None
    if settings.needs_scores:
        given_scores = None if batch.pair_score_margin is None else batch.pair_score_margin.reshape(-1)
        scores = _score_margins(given_scores, weights, policy.dtype)
    weights = weights.astype(policy.dtype)
    return PairFeatures(*reduce(policy), *reference, _pairs_first(lengths), pair_weights, weights, router, scores)


def _score_margins(given: AnyArray | None, weights: Array, dtype: Any) -> Array:
    """Checks score margins [b] where their values are known, and replaces those of padding pairs by 1."""
    check_scores(given, weights)
    assert given is not None
    # 1, since losses read the logarithm: padding may hold 0 or NaN.
    return jnp.where(weights > 0, given, 1).astype(dtype)


def _pairs_first(values_rpn: Array) -> Array:
    return rearrange(values_rpn, "r p n -> (r p) n")


def predicted_tokens(batch: PreferenceBatch) -> Array:
    """Returns bool [b, 2, t], True on completion tokens that are predicted: all of them except one at position 0."""
    return jnp.asarray(batch.completion_mask, bool).at[..., 0].set(False)


def _sums(
    token_logps: Array, *, mask: Array, lengths: Array, ld_alpha: Array | float | None, real: Array
) -> tuple[Array, Array | None]:
    """Sums [b, 2, t] to [b, 2], once plainly and once with the weights of LD-DPO; [b, 2] are sums already."""
    if token_logps.ndim == 2:
        return jnp.where(real[:, None], token_logps, 0), None
    plain = sequence_logps(token_logps, mask)
    if ld_alpha is None:
        return plain, None
    shared = jnp.broadcast_to(lengths.min(-1, keepdims=True), lengths.shape)
    return plain, sequence_logps(token_logps, mask, ld_alpha=ld_alpha, shared_lengths=shared)


def _reference_token_logps(
    params: Params | None, batch: PreferenceBatch, apply_fn: ApplyFn, settings: LossSettings
) -> Array:
    """Returns the log-probs of the frozen reference, [b, 2, t] or [b, 2]: those of the batch, or computed by the model.

    Raises:
      ValueError: params and batch.reference_logps are both given or both missing, or the shape is wrong.
    """
    if (params is None) == (batch.reference_logps is None):
        raise _reference_error(settings, "batch.reference_logps", params)
    if params is not None:
        return jax.lax.stop_gradient(pair_token_logps(jax.lax.stop_gradient(params), batch, apply_fn=apply_fn))
    given: Array = jnp.asarray(batch.reference_logps)
    if given.shape not in (batch.tokens.shape, batch.tokens.shape[:2]):
        raise ValueError(
            f"batch.reference_logps must be [b, 2] or [b, 2, t] for tokens {batch.tokens.shape}, found {given.shape}"
        )
    if given.ndim == 2 and settings.ld_alpha is not None:
        raise ValueError(
            "ld_alpha weighs tokens, so batch.reference_logps must be [b, 2, t], one value per token; found sums [b, 2]"
        )
    return jax.lax.stop_gradient(given)


def _reference_error(settings: LossSettings, field: str, params: Params | None) -> ValueError:
    return ValueError(
        f"loss_type {' + '.join(settings.loss_types)} needs a reference: expected either reference_params or {field}, "
        f"found {'neither' if params is None else 'both'}"
    )


# --- sums over the completions of packed rows, the packed counterpart of `sequence_logps`
#
# Axes: r rows, k scored tokens of a row, p items of a row, n sides of an item (chosen, rejected), c = n p completions.
# `logp_pair` [r, k] says which completion a token belongs to, n * item + side; a number outside [0, n p) is padding.


def belongs(logp_pair: AnyArray, num_completions: int) -> Array:
    """Returns bool [r, k, c], True where a scored token belongs to a completion; padding belongs to none."""
    return logp_pair[..., None] == jnp.arange(num_completions)


def completion_sums(values: Array, belongs_rkc: Array, num_sides: int = 2) -> Array:
    """Sums values [r, k] over the tokens of each completion, to [r, p, n]. Values of padding are never read.

    >>> logps, ids = jnp.array([[-1.0, -2.0, -4.0, jnp.nan]]), jnp.array([[0, 0, 1, 9]])
    >>> completion_sums(logps, belongs(ids, 2)).tolist()
    [[[-3.0, -4.0]]]
    """
    # Comparing and summing gives the same order of additions on every device; a scatter-add would not.
    return rearrange(jnp.where(belongs_rkc, values[..., None], 0).sum(-2), "r (p n) -> r p n", n=num_sides)


def tail_weights(belongs_rkc: Array, lengths_rpn: Array, ld_alpha: Array | float, dtype: Any) -> Array:
    """Returns the weight of each scored token under LD-DPO, [r, k].

    It is ld_alpha for tokens after the length of the pair's shorter completion, and 1 for all others.

    Args:
      lengths_rpn: int [r, p, 2], number of scored tokens of each completion.
    """
    ordinal_rkc = jnp.cumsum(belongs_rkc, axis=-2)  # 1 for a completion's first token
    shared_rpn = jnp.broadcast_to(lengths_rpn.min(-1, keepdims=True), lengths_rpn.shape)
    shared_rc = rearrange(shared_rpn, "r p n -> r (p n)")
    # A token belongs to at most one completion, so `any` picks the answer for that one.
    is_tail_rk = (belongs_rkc & (ordinal_rkc > shared_rc[:, None])).any(-1)
    return jnp.where(is_tail_rk, jnp.asarray(ld_alpha, dtype), jnp.ones((), dtype))
