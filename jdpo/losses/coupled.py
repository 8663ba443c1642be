"""Losses that depend on other pairs: those that sort the global batch, and the running mean that bco_pair reads.

The notation is that of `jdpo.loss_specs`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jdpo.losses.pairwise import LossInputs, smoothed

Array = jax.Array


def aot(x: LossInputs) -> Array:
    """-(1-e) ls(beta d) - e ls(-beta d), d = sort(l_w - l_l) - sort(r_w - r_l): compares quantiles with quantiles.

    The loss of a quantile is that of the pair with this quantile of l_w - l_l. For l_w - l_l = (5, 1), r_w - r_l =
    (0, 2) and beta = 0.1, d = (1 - 0, 5 - 2): the second pair has -ls(0.1) = 0.644397, the first -ls(0.3) = 0.554355.
    """
    return _by_quantile(x, x.chosen_logps - x.rejected_logps, x.reference_margins)


def aot_unpaired(x: LossInputs) -> Array:
    """`aot` with d = sort(a) - sort(b): chosen and rejected need not answer the same prompt."""
    return _by_quantile(x, x.chosen_logratios, x.rejected_logratios)


def _by_quantile(x: LossInputs, upper: Array, lower: Array) -> Array:
    sharding = jax.typeof(upper).sharding
    if any(sharding.spec):  # Explicit mesh axes: sorting needs all pairs, which only GSPMD would gather by itself.
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        x = x._replace(real=None if x.real is None else reshard(x.real, whole))
        losses: Array = reshard(_by_quantile(x, reshard(upper, whole), reshard(lower, whole)), sharding)
        return losses
    # Losses are computed by rank; the inverse permutation puts each one back at the pair with that quantile.
    order = _ascending(upper, x.real)
    gaps = upper[order] - lower[_ascending(lower, x.real)]
    return smoothed(x.beta * gaps, x.smoothing)[jnp.argsort(order)]


def _ascending(values: Array, real: Array | None) -> Array:
    """Returns indices that sort `values` with padding last, so that no real pair meets a padding pair."""
    return jnp.argsort(values if real is None else jnp.where(real, values, jnp.inf))


FUNCTIONS = {
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
"""The losses of this file by name."""


class LossState(NamedTuple):
    """The running state of bco_pair: the mean reward of all pairs so far.

    Attributes:
      mean_reward: float32 scalar, mean of beta a and beta b.
      num_pairs: float32 scalar, number of pairs.
    """

    mean_reward: Array
    num_pairs: Array


def init_loss_state() -> LossState:
    """Returns the state before the first step: mean 0 over no pairs."""
    return LossState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update_loss_state(state: LossState, chosen_rewards: Array, rejected_rewards: Array, weights: Array) -> LossState:
    """Adds the pairs of a step to the mean. Call it after the loss of the step has read the old state.

    Args:
      state: the mean so far.
      chosen_rewards, rejected_rewards: float [b], those of the global batch.
      weights: float [b], 0 for padding pairs.
    """
    count = weights.sum()
    total = jnp.where(weights > 0, weights * (chosen_rewards + rejected_rewards) / 2, 0).sum()
    seen = state.num_pairs + count.astype(state.num_pairs.dtype)
    # Moving the old mean keeps its precision for any number of steps; a running sum in float32 would not.
    mean = state.mean_reward + (total - count * state.mean_reward) / jnp.maximum(seen, 1)  # unchanged by padding alone
    return LossState(mean.astype(state.mean_reward.dtype), seen)
