"""Learning-rate schedules and optimizers, from optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdpo.config.groups import OptimizationSettings
from jdpo.models.xielu import XIELU_PARAMETERS
from jdpo.training.step.offload import weight_by_weight
from jdpo.training.step.rounding import store, wide
from jdpo.words import figure

UNDECAYED = ("scale", "bias", "sinks", "a_log", "dt_bias", *XIELU_PARAMETERS)
"""Last names of the weights without weight decay: norm scales, biases, attention sinks, the rates of decay of a
DeltaNet's state, and parameters of xIELU."""


def num_warmup_steps(settings: OptimizationSettings, num_steps: int) -> int:
    """Returns the steps of linear warm-up: `warmup_steps` if given, else `warmup_ratio` of the run, rounded up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * num_steps)


def learning_rate_schedule(settings: OptimizationSettings, num_steps: int) -> optax.Schedule:
    """Returns the schedule, update number (from 0) -> learning rate: linear warm-up, then constant or decay to 0.

    Raises:
      ValueError: the warm-up is longer than the run.

    >>> settings = OptimizationSettings(learning_rate=8.0, warmup_steps=2)
    >>> schedule = learning_rate_schedule(settings, num_steps=6)
    >>> [float(schedule(step)) for step in range(6)]
    [0.0, 4.0, 8.0, 6.0, 4.0, 2.0]
    """
    warmup = num_warmup_steps(settings, num_steps)
    if warmup > num_steps:
        raise ValueError(
            f"warmup_steps {warmup} is more than the {figure(num_steps, 'step')} of the run; lower one or the other"
        )
    # At least 1, as schedules divide by it: the whole run may be warm-up.
    peak, rest = settings.learning_rate, max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings.lr_scheduler_type]
    # Without a warm-up the first step already has the peak rate.
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(params: Any) -> Any:
    """Returns True for the weights that decay: all except those of `UNDECAYED`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def param_dtype_of(compute_dtype: str, optimizer: str) -> Any:
    """Returns the dtype of the weights: bfloat16 with adamw_bf16, else float32, or float64 if that is compute_dtype.

    Args:
      compute_dtype: not auto.
      optimizer: its name.

    Raises:
      ValueError: adamw_bf16 with float64.
    """
    if optimizer != "adamw_bf16":
        return jnp.promote_types(jnp.dtype(compute_dtype), jnp.float32)
    if compute_dtype == "float64":
        raise ValueError(
            "optimizer adamw_bf16 keeps weights in bfloat16, which compute_dtype float64 cannot make exact; "
            "set optimizer.name to adamw, or compute_dtype to bfloat16"
        )
    return jnp.dtype(jnp.bfloat16)


def make_optimizer(settings: OptimizationSettings, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by global norm, then the rule under the schedule, all computed in float32 or wider.

    Its `update` takes the keyword `key`, for the rounding of bfloat16 moments, and returns updates that are not
    rounded, for `rounding.apply_updates`. Moments are kept in the dtype of their weights, and in the memory that the
    shardings of the state name.
    """
    rule, schedule = settings.optimizer, learning_rate_schedule(settings, num_steps)
    optimizer = RULES[rule.name](schedule, rule.weight_decay, **rule.settings)
    # Inside of clipping, which needs the gradients of all weights at once.
    if settings.offload_optimizer:
        optimizer = weight_by_weight(optimizer)
    if settings.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    # Widened here, so that every rule computes in float32 whatever its weights are kept in.
    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(wide(grads), state, wide(params), **extra)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adamw(
    schedule: optax.Schedule, weight_decay: float, *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)


def _adamw_bf16(
    schedule: optax.Schedule, weight_decay: float, *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    return optax.chain(
        # In the order of optax.adamw: the rate scales decay and direction together.
        _scale_by_rounded_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_rounded_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` whose moments are stored as stochastically rounded bfloat16 where their weights are.

    At b2 = 0.999 the second moment moves by at most 0.1 % per step, which is below half of bfloat16's last bit: rounded
    to nearest, it would never move. The update itself is computed from the moments before rounding.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(grads: Any, state: Any, params: Any = None, *, key: Any, **_: Any) -> tuple[Any, Any]:
        updates, new = adam.update(grads, state._replace(mu=wide(state.mu), nu=wide(state.nu)), params)
        mu, nu = store([new.mu, new.nu], [state.mu, state.nu], key)
        return updates, new._replace(mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _adafactor(
    schedule: optax.Schedule, weight_decay: float, *, b1: float | None, eps: float
) -> optax.GradientTransformation:
    # optax scales the rate by each weight's size unless told otherwise, and leaves decay unscaled by the rate: here
    # learning_rate and weight_decay mean what they do for every other rule.
    return optax.adafactor(
        schedule,
        multiply_by_parameter_scale=False,
        momentum=b1,
        eps=eps,
        weight_decay_rate=(lambda step: weight_decay * schedule(step)) if weight_decay else None,
        weight_decay_mask=decay_mask,
    )


def _lion(schedule: optax.Schedule, weight_decay: float, *, b1: float, b2: float) -> optax.GradientTransformation:
    return optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)


def _sgd(schedule: optax.Schedule, weight_decay: float, *, momentum: float | None) -> optax.GradientTransformation:
    return optax.chain(
        # Decay after the momentum is decoupled, as it is in the other rules.
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw_bf16": _adamw_bf16,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}
"""optimizer.name -> a function of the schedule, the weight decay and the settings of the rule."""
