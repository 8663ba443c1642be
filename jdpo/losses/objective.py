"""The DPO objective of a batch: two models, one batch, one number.

Here, and nowhere else, stands stop_gradient: the reference never learns.

Axes: b pairs, n=2 (chosen, rejected), t positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
from jdpo.losses.preference import PreferenceLoss, check_loss, preference_loss
from jdpo.types import CHOSEN, REJECTED, PreferenceBatch

Array = Any
Params = Any
ApplyFn = Callable[[Params, Array, Array], Array]


def pair_logps(params: Params, batch: PreferenceBatch, *, apply_fn: ApplyFn) -> Array:
    """Summed completion log-probs of both sides of every pair: float32 [b, 2].

    The one function behind policy and reference, training and evaluation.

    Args:
      params: the model's parameters.
      batch: tokens and masks [b, 2, t].
      apply_fn: (params, tokens [n, t], attention_mask [n, t]) -> logits [n, t, v].
    """
    num_pairs = batch.tokens.shape[0]
    # (b n) keeps a pair's two sides on the shard that holds the pair; (n b) would cross shards.
    flat_tokens = rearrange(batch.tokens, "b n t -> (b n) t")
    flat_attention = rearrange(batch.attention_mask, "b n t -> (b n) t")
    flat_completion = rearrange(batch.completion_mask, "b n t -> (b n) t")
    logits = apply_fn(params, flat_tokens, flat_attention)
    logps = sequence_logps(*shifted_token_logps(logits, flat_tokens, flat_completion))
    return rearrange(logps, "(b n) -> b n", b=num_pairs)


def reference_pair_logps(params: Params | None, batch: PreferenceBatch, *, apply_fn: ApplyFn) -> Array:
    """The frozen reference's [b, 2] log-probs: from the batch where it carries them, else from `params`.

    Raises:
      ValueError: neither is given, or both are.
    """
    if (params is None) == (batch.reference_logps is None):
        raise ValueError(
            "expected either reference_params or batch.reference_logps, found "
            + ("neither" if params is None else "both")
        )
    if params is not None:
        return jax.lax.stop_gradient(pair_logps(jax.lax.stop_gradient(params), batch, apply_fn=apply_fn))
    given: Array = batch.reference_logps
    if given.shape not in (batch.tokens.shape, batch.tokens.shape[:2]):
        raise ValueError(
            f"batch.reference_logps must be [b, 2] or [b, 2, t] for tokens {batch.tokens.shape}, found {given.shape}"
        )
    logps = sequence_logps(given[..., 1:], batch.completion_mask[..., 1:]) if given.ndim == 3 else given
    return jax.lax.stop_gradient(logps)


PREFERENCE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Names of what `preference_metrics` gives."""


def preference_metrics(result: PreferenceLoss, policy_logps: Array) -> dict[str, Array]:
    """Per-pair metrics [b] under their usual names; accuracy is strict, so ties count 0."""
    accurate = result.chosen_rewards > result.rejected_rewards
    values = (
        result.losses,
        result.chosen_rewards,
        result.rejected_rewards,
        result.chosen_rewards - result.rejected_rewards,
        accurate.astype(result.losses.dtype),
        policy_logps[..., CHOSEN],
        policy_logps[..., REJECTED],
    )
    return dict(zip(PREFERENCE_METRICS, values, strict=True))


def pair_losses(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch,
    *,
    apply_fn: ApplyFn,
    loss_type: str = "sigmoid",
    beta: Array | float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Loss of each pair, and the metrics of each pair: (float32 [b], {name: float32 [b]}).

    Metrics carry no gradient. Arguments and errors as `dpo_loss`.
    """
    policy = pair_logps(policy_params, batch, apply_fn=apply_fn)
    reference = reference_pair_logps(reference_params, batch, apply_fn=apply_fn)
    # Every completion token is predicted by the position before it, so the token at 0 is never scored.
    lengths = batch.completion_mask[..., 1:].sum(-1)
    result = preference_loss(
        policy[:, CHOSEN],
        policy[:, REJECTED],
        reference[:, CHOSEN],
        reference[:, REJECTED],
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_lengths=lengths[:, CHOSEN],
        rejected_lengths=lengths[:, REJECTED],
    )
    return result.losses, jax.lax.stop_gradient(preference_metrics(result, policy))


def make_dpo_loss(
    apply_fn: ApplyFn, *, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The objective for those who jit, shard or differentiate around it themselves.

    Returns:
      loss(policy_params, reference_params, batch, *, beta=0.1, normalizer=None) -> (scalar, metrics), see
      `dpo_loss`.

    Raises:
      ValueError: an unknown loss, or an option that it cannot honour.
    """
    check_loss(loss_type, label_smoothing=label_smoothing)

    def loss_fn(
        policy_params: Params,
        reference_params: Params | None,
        batch: PreferenceBatch,
        *,
        beta: Array | float = 0.1,
        normalizer: Array | float | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        losses, metrics = pair_losses(
            policy_params,
            reference_params,
            batch,
            apply_fn=apply_fn,
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
        )
        weights = jnp.ones_like(losses) if batch.weights is None else batch.weights.astype(losses.dtype)
        count = weights.sum() if normalizer is None else normalizer
        return weighted_sum(losses, weights) / count, {
            name: weighted_sum(values, weights) / count for name, values in metrics.items()
        }

    return loss_fn


def weighted_sum(values: Array, weights: Array) -> Array:
    """Sum of weights * values where a weight of 0 silences its value whatever it is, NaN included.

    >>> import jax.numpy as jnp
    >>> weighted_sum(jnp.array([2.0, jnp.nan]), jnp.array([1.0, 0.0])).item()
    2.0
    """
    return jnp.where(weights > 0, values * weights, 0).sum()


@partial(jax.jit, static_argnames=("apply_fn", "loss_type", "label_smoothing"))
def dpo_loss(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch,
    *,
    apply_fn: ApplyFn,
    loss_type: str = "sigmoid",
    beta: Array | float = 0.1,
    label_smoothing: float = 0.0,
    normalizer: Array | float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean preference loss of a batch under a policy and a frozen reference (arXiv 2305.18290, eq. 7). Jitted.

    Differentiable in `policy_params`; the reference stands under stop_gradient.

    Args:
      policy_params: parameters of the model in training, any pytree.
      reference_params: parameters of the frozen reference, or None where the batch has reference_logps.
      batch: PreferenceBatch of [b, 2, t] arrays.
      apply_fn: (params, tokens int [n, t], attention_mask bool [n, t]) -> logits [n, t, v]; static.
      loss_type: a name in `jdpo.losses.LOSSES`; static.
      beta: > 0; traced, so that a sweep compiles once.
      label_smoothing: e in [0, 0.5); static.
      normalizer: what the sum over pairs is divided by; default the sum of batch.weights. Give the pairs of
        the global batch when accumulating over micro-batches.

    Returns:
      (scalar loss, {metric name: scalar}), float32; metrics as TRL names them.

    Raises:
      ValueError: at trace time; see `preference_loss` and `reference_pair_logps`.
    """
    loss_fn = make_dpo_loss(apply_fn, loss_type=loss_type, label_smoothing=label_smoothing)
    return loss_fn(policy_params, reference_params, batch, beta=beta, normalizer=normalizer)
