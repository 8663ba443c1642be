"""Learning-rate schedules and optimizers, from optax."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from jdpo.config import TrainConfig

UNDECAYED = ("scale", "bias")
"""Last names of the weights that weight decay leaves alone: norm scales and biases."""


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Steps of linear warm-up: `warmup_steps` where given, else `warmup_ratio` of the run, rounded up."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * num_steps)


def learning_rate_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Update number (from 0) -> learning rate: linear warm-up from 0, then constant, linear or cosine to 0.

    Raises:
      ValueError: the warm-up is longer than the run.

    >>> config = TrainConfig(model_name_or_path="", output_dir="", datasets="", learning_rate=8.0, warmup_steps=2)
    >>> schedule = learning_rate_schedule(config, num_steps=6)
    >>> [float(schedule(step)) for step in range(6)]
    [0.0, 4.0, 8.0, 6.0, 4.0, 2.0]
    """
    warmup = num_warmup_steps(config, num_steps)
    if warmup > num_steps:
        raise ValueError(f"warmup_steps {warmup} is more than the {num_steps} steps of the run; lower one or the other")
    peak, rest = config.learning_rate, max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.lr_scheduler_type]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(params: Any) -> Any:
    """True on the weights that decay: all but norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW under the schedule."""
    rule = config.optimizer
    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=rule.b1,
        b2=rule.b2,
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        mask=decay_mask,
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
