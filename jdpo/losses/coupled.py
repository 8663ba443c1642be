"""Losses that see the whole batch: sorted ones, and the running mean that one of them reads.

Notation as in pairwise.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jdpo.losses.pairwise import LossInputs, smoothed

Array = jax.Array


def aot(x: LossInputs) -> Array:
    """-(1-e) ls(beta d) - e ls(-beta d), d = sort(l_w - l_l) - sort(the reference's): quantile against quantile.

    The loss of a quantile stands at the pair that has it. With l_w - l_l = (5, 1), the reference's (0, 2), beta = 0.1:
    d = (1 - 0, 5 - 2), so that the second pair has -ls(0.1) = 0.644397 and the first -ls(0.3) = 0.554355.
    """
    return _by_quantile(x, x.chosen_logps - x.rejected_logps, x.reference_margins)


def aot_unpaired(x: LossInputs) -> Array:
    """The same with d = sort(a) - sort(b): chosen and rejected need not belong together."""
    return _by_quantile(x, x.chosen_logratios, x.rejected_logratios)


def _by_quantile(x: LossInputs, upper: Array, lower: Array) -> Array:
    sharding = jax.typeof(upper).sharding
    if any(sharding.spec):  # explicit mesh axes: sorting needs all pairs, which GSPMD would gather by itself
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        x = x._replace(real=None if x.real is None else reshard(x.real, whole))
        losses: Array = reshard(_by_quantile(x, reshard(upper, whole), reshard(lower, whole)), sharding)
        return losses
    order = _ascending(upper, x.real)
    gaps = upper[order] - lower[_ascending(lower, x.real)]
    return smoothed(x.beta * gaps, x.smoothing)[jnp.argsort(order)]


def _ascending(values: Array, real: Array | None) -> Array:
    """Indices that sort `values`, padding last, so that no real pair meets a padding one."""
    return jnp.argsort(values if real is None else jnp.where(real, values, jnp.inf))


FUNCTIONS = {
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
"""The losses of this file by name."""


class LossState(NamedTuple):
    """What bco_pair remembers from step to step: the mean reward of all pairs seen so far.

    Attributes:
      mean_reward: float32 scalar, mean of beta a and beta b.
      num_pairs: float32 scalar, over how many pairs.
    """

    mean_reward: Array
    num_pairs: Array


def init_loss_state() -> LossState:
    """Before the first step: delta 0, no pairs."""
    return LossState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update_loss_state(state: LossState, chosen_rewards: Array, rejected_rewards: Array, weights: Array) -> LossState:
    """Takes in a step's pairs; call it after the step's loss has read the old state.

    Args:
      state: the mean so far.
      chosen_rewards, rejected_rewards: float [b] of the global batch.
      weights: float [b], 0 on padding pairs.
    """
    count = weights.sum()
    total = jnp.where(weights > 0, weights * (chosen_rewards + rejected_rewards) / 2, 0).sum()
    seen = state.num_pairs + count.astype(state.num_pairs.dtype)
    # Moving the old mean keeps float32 exact enough for ever; a running sum would not.
    mean = state.mean_reward + (total - count * state.mean_reward) / jnp.maximum(seen, 1)
    return LossState(mean.astype(state.mean_reward.dtype), seen)
