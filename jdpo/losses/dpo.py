"""The whole objective for other JAX code: parameters and a batch in, a scalar and metrics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.losses.argument_checks import check_batch, check_completions, unknown_name, values_of
from jdpo.losses.coupled import LossState
from jdpo.losses.pair_logps import ApplyFn, pair_features
from jdpo.losses.pair_losses import Totals, feature_losses, next_loss_state, pair_totals, weighted_sum
from jdpo.losses.settings import OPTION_NAMES, LossSettings, check_number, concrete, loss_settings
from jdpo.types import PreferenceBatch

Array = jax.Array
Params = Any


_OF_CALL = ("beta", "loss_state", "normalizer", "num_chosen_tokens")
"""What a call of the function that `make_dpo_loss` returns takes by name."""


def make_dpo_loss(
    apply_fn: ApplyFn, *, loss_type: str | Sequence[str] = "sigmoid", beta: Array | float = 0.1, **options: Any
) -> Callable[..., tuple[Array, dict[str, Any]]]:
    """The objective for those who jit, shard or differentiate around it themselves.

    Args: as `dpo_loss`.

    Returns:
      loss(policy_params, reference_params, batch, *, beta=None, loss_state=None, normalizer=None,
      num_chosen_tokens=None) -> (scalar, metrics), see `dpo_loss`; what is given here replaces what was given above.

    Raises:
      ValueError: an unknown loss or option, or an option that the losses cannot honour.
    """
    settings, all_tokens = _objective_settings(loss_type, beta, options)

    def loss_fn(
        policy_params: Params,
        reference_params: Params | None,
        batch: PreferenceBatch,
        *,
        beta: Array | float | None = None,
        loss_state: LossState | None = None,
        normalizer: Array | float | None = None,
        num_chosen_tokens: Array | float | None = None,
        **options: Any,
    ) -> tuple[Array, dict[str, Any]]:
        for name in options:
            if name in OPTION_NAMES:
                raise ValueError(f"{name} is given to make_dpo_loss, not to the loss that it returns")
            raise unknown_name("option", name, _OF_CALL, "A call takes")
        check_batch(batch)
        check_completions(batch)
        num_chosen_tokens = all_tokens if num_chosen_tokens is None else num_chosen_tokens
        _check_normalizer(settings, batch, normalizer, num_chosen_tokens)
        return _batch_loss(
            policy_params,
            reference_params,
            batch,
            settings if beta is None else dataclasses.replace(settings, beta=check_number("beta", beta)),
            loss_state,
            normalizer,
            num_chosen_tokens,
            apply_fn=apply_fn,
        )

    return loss_fn


def dpo_loss(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch,
    *,
    apply_fn: ApplyFn,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: Array | float = 0.1,
    loss_state: LossState | None = None,
    normalizer: Array | float | None = None,
    **options: Any,
) -> tuple[Array, dict[str, Any]]:
    """Mean preference loss of a batch under a policy and a frozen reference (arXiv 2305.18290, eq. 7). Jitted.

    Differentiable in `policy_params`; the reference stands under stop_gradient.

    Args:
      policy_params: parameters of the model in training, any pytree.
      reference_params: parameters of the frozen reference; None where the batch has reference_logps, or for losses
        without a reference, which do not read it.
      batch: PreferenceBatch of [b, 2, t] arrays.
      apply_fn: (params, tokens int [n, t], attention_mask bool [n, t]) -> logits [n, t, v]; static, so give one
        function, not a new lambda a call.
      loss_type: a name in `jdpo.losses.LOSSES`, or several; static.
      beta: > 0; traced as all numbers, so that a sweep compiles once.
      loss_state: what the call before left in metrics["loss_state"], for losses that have one (bco_pair: delta is
        its running mean, read before and updated after). None: bco_delta, and a state that starts here.
      normalizer: what the sum over pairs is divided by; default the sum of batch.weights. Give the pairs of the
        global batch when accumulating over micro-batches, and num_chosen_tokens for means over tokens; losses that
        need the global batch (aot) cannot be accumulated so. Within jax.shard_map a batch is a part, too.
      **options: label_smoothing, loss_weights, f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma,
        cpo_alpha, orpo_lambda, rpo_alpha, bco_delta, num_chosen_tokens, as in `preference_loss`, and
        ld_alpha: tokens past the shorter side's length weigh so much, in policy and reference; LD-DPO, arXiv
          2409.06411; none by default.
        use_weighting: False; WPO, arXiv 2406.11827: each pair's loss times how likely the policy finds both sides.

    Returns:
      (scalar loss, {metric name: scalar}), float32; metrics as TRL names them, `loss/<name>` for each of several
      losses, and `loss_state` where a loss has one.

    Raises:
      ValueError: see `preference_loss`; a reference that is missing, doubled, or of no use for ld_alpha; a side without
        a completion token, in a pair whose weight is not 0 (checked where the masks are known, so not under jit).
    """
    settings, num_chosen_tokens = _objective_settings(loss_type, beta, options)
    check_batch(batch)
    check_completions(batch)
    _check_normalizer(settings, batch, normalizer, num_chosen_tokens)
    return _jitted_batch_loss(
        policy_params,
        reference_params,
        batch,
        settings,
        loss_state,
        normalizer,
        num_chosen_tokens,
        apply_fn=apply_fn,
    )


def _objective_settings(
    loss_type: str | Sequence[str], beta: Array | float, options: dict[str, Any]
) -> tuple[LossSettings, Array | float | None]:
    if options.get("pair_weights") is not None:
        raise ValueError("pair_weights is for preference_loss; weigh the pairs of a batch by use_weighting")
    if options.get("bco_running_delta"):
        raise ValueError("a running delta is asked for by loss_state: pass on what metrics['loss_state'] holds")
    settings, of_batch = loss_settings(loss_type, beta=beta, **options)
    return settings, of_batch.get("num_chosen_tokens")


def _check_normalizer(settings: LossSettings, batch: PreferenceBatch, normalizer: Any, num_chosen_tokens: Any) -> None:
    """Refuses an accumulation that would be silently wrong, where it can be seen."""
    if normalizer is None:
        return
    if settings.token_mean and num_chosen_tokens is None:
        raise ValueError(
            "normalizer says that this batch is a part of a larger one, so a mean over tokens needs num_chosen_tokens "
            "too: the chosen completion tokens of the whole"
        )
    whole = concrete(normalizer)
    if settings.needs_global_batch and whole is not None:
        here = _num_pairs(batch)
        if here is not None and whole != here:
            raise ValueError(
                f"loss_type {' + '.join(settings.loss_types)} sorts the global batch, so it cannot be accumulated over "
                f"parts: normalizer {whole:g}, and {here:g} pairs in this batch"
            )


def _num_pairs(batch: PreferenceBatch) -> float | None:
    """Real pairs of a batch, or None where they are not known before it is computed."""
    if batch.weights is None:
        return float(batch.tokens.shape[0])
    weights = values_of(batch.weights)
    return None if weights is None else float(weights.sum())


def _batch_loss(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch,
    settings: LossSettings,
    loss_state: LossState | None,
    normalizer: Array | float | None,
    num_chosen_tokens: Array | float | None,
    *,
    apply_fn: ApplyFn,
) -> tuple[Array, dict[str, Any]]:
    if loss_state is not None and not settings.has_state:
        raise ValueError(f"loss_type {' + '.join(settings.loss_types)} has no running state; loss_state must be None")
    if loss_state is not None and "bco_delta" in settings.numbers:
        raise ValueError("loss_state holds bco_pair's delta; bco_delta must not be given beside it")
    features = pair_features(policy_params, reference_params, batch, apply_fn=apply_fn, settings=settings)
    counted = pair_totals(batch)
    totals = Totals(
        counted.normalizer if normalizer is None else normalizer,
        counted.num_chosen_tokens if num_chosen_tokens is None else num_chosen_tokens,
    )
    losses, rows = feature_losses(features, totals, settings=settings, loss_state=loss_state)
    mean = partial(_mean, weights=features.weights, count=totals.normalizer)
    metrics: dict[str, Any] = {name: mean(values) for name, values in rows.items()}
    if settings.has_state:
        metrics["loss_state"] = next_loss_state(features, settings=settings, loss_state=loss_state)
    return mean(losses), metrics


def _mean(values: Array, weights: Array, count: Array | float) -> Array:
    return weighted_sum(values, weights) / jnp.where(count == 0, 1, count)  # a batch of nothing gives 0


_jitted_batch_loss: Callable[..., tuple[Array, dict[str, Any]]] = jax.jit(_batch_loss, static_argnames="apply_fn")
