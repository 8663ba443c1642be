"""The preference objective for other JAX code: takes parameters and a batch, returns a scalar and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.losses.argument_checks import check_batch, check_completions, check_packed, unknown_name, values_of
from jdpo.losses.coupled import LossState
from jdpo.losses.pair_logps import LogpsFn, TokenScores, packed_features, pair_features
from jdpo.losses.pair_losses import Totals, feature_losses, next_loss_state, packed_totals, pair_totals, weighted_sum
from jdpo.losses.settings import OPTION_NAMES, LossSettings, check_number, concrete, loss_settings
from jdpo.types import PackedBatch, PreferenceBatch

Array = jax.Array
Params = Any


_OF_CALL = ("beta", "loss_state", "normalizer", "num_chosen_tokens")
"""Keywords of the function that `make_dpo_loss` returns."""


def make_dpo_loss(
    apply_fn: Callable[..., Any],
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: Array | float = 0.1,
    **options: Any,
) -> Callable[..., tuple[Array, dict[str, Any]]]:
    """Makes the objective as a function without `jit`, for code that jits, shards or differentiates it itself.

    The arguments are those of `dpo_loss`.

    Returns:
      loss(policy_params, reference_params, batch, *, beta=None, loss_state=None, normalizer=None,
      num_chosen_tokens=None) -> (scalar, metrics), see `dpo_loss`. The keywords of a call replace those given here.

    Raises:
      ValueError: an unknown loss or option, or an option that the losses cannot honour.
    """
    settings, all_tokens = _objective_settings(loss_type, beta, options)

    def loss_fn(
        policy_params: Params,
        reference_params: Params | None,
        batch: PreferenceBatch | PackedBatch,
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
        _check_batch(batch)
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
    batch: PreferenceBatch | PackedBatch,
    *,
    apply_fn: Callable[..., Any],
    loss_type: str | Sequence[str] = "sigmoid",
    beta: Array | float = 0.1,
    loss_state: LossState | None = None,
    normalizer: Array | float | None = None,
    **options: Any,
) -> tuple[Array, dict[str, Any]]:
    """Computes the mean preference loss of a batch under a policy and a frozen reference. Jitted.

    With the default options this is DPO (arXiv 2305.18290, eq. 7). The loss is differentiable in `policy_params`; the
    reference is under stop_gradient.

    Args:
      policy_params: parameters of the model in training, any pytree.
      reference_params: parameters of the frozen reference. None if the batch has its log-probs, or for losses without
        a reference, which do not read it.
      batch: PreferenceBatch of [b, 2, t] arrays, or PackedBatch of [m, ...] arrays, as `jdpo.pack` returns it.
      apply_fn: (params, tokens int [n, t], attention_mask bool [n, t]) -> logits [n, t, v]; for a PackedBatch,
        (params, batch) -> log-probs [m, c], as `jdpo.losses.packed_token_logps` returns them. It is static: pass the
        same function in every call, not a new lambda.
      loss_type: a name in `jdpo.losses.LOSSES`, or several; static.
      beta: above 0. All numbers are traced, so that a sweep compiles once.
      loss_state: metrics["loss_state"] of the previous call, for losses with a running state. (bco_pair: its delta is
        the running mean, which is read before it is updated.) None: bco_delta, and a new state.
      normalizer: divisor of the sum over pairs; default: the sum of batch.weights. When accumulating over
        micro-batches, or within jax.shard_map, pass the number of pairs of the global batch, and num_chosen_tokens for
        means over tokens. Losses that need the global batch (aot) cannot be accumulated in this way.
      **options: fields of `jdpo.loss_specs.LossOptions`, which docs/losses.md describes, loss_weights and
        num_chosen_tokens; see `preference_loss`.

    Returns:
      (scalar loss, {metric name: scalar}), float32. Metrics have TRL's names; several losses add `loss/<name>` for
      each, and losses with a running state add `loss_state`.

    Raises:
      ValueError: see `preference_loss`; the reference is missing, given twice, or has no values per token for ld_alpha;
        a side has no completion token in a pair whose weight is not 0 (checked where masks are known: not under jit).
    """
    # All checks come before jit, within which arrays have no values.
    settings, num_chosen_tokens = _objective_settings(loss_type, beta, options)
    _check_batch(batch)
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
        raise ValueError("pair_weights is for preference_loss; here, use_weighting weighs the pairs of a batch")
    if options.get("bco_running_delta"):
        raise ValueError("a running delta is asked for by loss_state: pass metrics['loss_state'] of the previous call")
    settings, of_batch = loss_settings(loss_type, beta=beta, **options)
    return settings, of_batch.get("num_chosen_tokens")


def _check_batch(batch: PreferenceBatch | PackedBatch) -> None:
    if isinstance(batch, PackedBatch):
        check_packed(batch)
    else:
        check_batch(batch)
        check_completions(batch)


def _check_normalizer(
    settings: LossSettings, batch: PreferenceBatch | PackedBatch, normalizer: Any, num_chosen_tokens: Any
) -> None:
    """Refuses an accumulation that would be silently wrong, if the values are known."""
    if normalizer is None:
        return
    if settings.token_mean and num_chosen_tokens is None:
        raise ValueError(
            "normalizer says that this batch is part of a larger one, so a mean over tokens needs num_chosen_tokens as "
            "well: the number of chosen completion tokens of the larger batch"
        )
    whole = concrete(normalizer)
    # A traced normalizer cannot be compared; sorted losses of parts are then wrong without a message.
    if settings.needs_global_batch and whole is not None:
        here = _num_pairs(batch)
        if here is not None and whole != here:
            raise ValueError(
                f"loss_type {' + '.join(settings.loss_types)} sorts the global batch, so it cannot be accumulated over "
                f"parts: found normalizer {whole:g}, and {here:g} pairs in this batch"
            )


def _num_pairs(batch: PreferenceBatch | PackedBatch) -> float | None:
    """Returns the number of real pairs of a batch, or None if it is traced."""
    given = batch.pair_weight if isinstance(batch, PackedBatch) else batch.weights
    if given is None:
        return float(batch.tokens.shape[0])
    weights = values_of(given)
    return None if weights is None else float(weights.sum())


def _batch_loss(
    policy_params: Params,
    reference_params: Params | None,
    batch: PreferenceBatch | PackedBatch,
    settings: LossSettings,
    loss_state: LossState | None,
    normalizer: Array | float | None,
    num_chosen_tokens: Array | float | None,
    *,
    apply_fn: Callable[..., Any],
) -> tuple[Array, dict[str, Any]]:
    if loss_state is not None and not settings.has_state:
        raise ValueError(f"loss_type {' + '.join(settings.loss_types)} has no running state; loss_state must be None")
    if loss_state is not None and "bco_delta" in settings.numbers:
        raise ValueError("loss_state holds the delta of bco_pair: give it or bco_delta, not both")
    # Totals of this batch, unless the caller knows those of the larger one.
    if isinstance(batch, PackedBatch):
        logps_fn, counted = _packed_logps_fn(apply_fn), packed_totals(batch)
        features = packed_features(policy_params, reference_params, batch, logps_fn=logps_fn, settings=settings)
    else:
        counted = pair_totals(batch)
        features = pair_features(policy_params, reference_params, batch, apply_fn=apply_fn, settings=settings)
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


def _packed_logps_fn(apply_fn: Callable[[Params, PackedBatch], Any]) -> LogpsFn:
    """Makes the function that `packed_features` takes out of a caller's own."""

    def logps_fn(params: Params, batch: PackedBatch, with_log_sum_sq: bool) -> TokenScores:
        outputs = apply_fn(params, batch)
        logps, log_sum_sq = outputs if isinstance(outputs, tuple) else (outputs, None)
        if with_log_sum_sq and log_sum_sq is None:
            raise ValueError(
                "use_weighting needs log sum_v p_v^2 as well: apply_fn must return what jdpo.losses.packed_token_logps "
                "returns with return_log_sum_sq=True"
            )
        for array in (logps, log_sum_sq) if with_log_sum_sq else (logps,):
            if getattr(array, "shape", None) != batch.logp_slot.shape:
                raise ValueError(
                    f"apply_fn must return a log-prob for each scored token, {batch.logp_slot.shape}, as "
                    f"jdpo.losses.packed_token_logps does; found {getattr(array, 'shape', type(array).__name__)}"
                )
        return TokenScores(logps, log_sum_sq if with_log_sum_sq else None)

    return logps_fn


def _mean(values: Array, weights: Array, count: Array | float) -> Array:
    return weighted_sum(values, weights) / jnp.where(count == 0, 1, count)  # 0 for a batch without real pairs


# apply_fn is static: a function cannot be traced. Everything else, the options of LossSettings included, is a pytree.
_jitted_batch_loss: Callable[..., tuple[Array, dict[str, Any]]] = jax.jit(_batch_loss, static_argnames="apply_fn")
