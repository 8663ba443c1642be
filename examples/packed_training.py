"""The training loop of the packed examples: packed batches on 8 devices and a cached reference, for any model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_pairs import LENGTH, difference, padded, toy_rows

import jdpo

jax.config.update("jax_num_cpu_devices", 8)  # without 8 GPUs or TPUs: as many fake devices of the CPU


def train_packed(
    packed_logps: Callable[[Any, jdpo.PackedBatch], jax.Array], padded_logits: Callable[..., Any], params: Any
) -> list[float]:
    """Trains a model on packed batches, and compares it with a padded batch at the end.

    Args:
      packed_logps: (params, batch) -> log-probs of the scored tokens of a packed batch.
      padded_logits: (params, tokens, mask) -> logits of a padded batch, for the comparison.
      params: the weights to start from, which are the reference, too.

    Returns:
      the loss of each step.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    # One row of slots per device, and the same sizes in every step, so that the step is compiled once.
    pack = partial(jdpo.pack, num_rows=8, num_slots=64, num_pairs=3, length=LENGTH, num_scored=64)
    rows, loss_fn, optimizer = toy_rows(64), jdpo.make_dpo_loss(packed_logps), optax.adam(3e-3)
    policy = reference = jax.device_put(params, everywhere)

    # The reference scores every row once.
    score, cached = jax.jit(packed_logps), []
    for chunk in np.split(np.arange(64), 4):
        batch = jax.device_put(pack([rows[i] for i in chunk]), by_row)
        cached += jdpo.unpack_logps(batch, score(reference, batch))

    @jax.jit
    def step(policy: Any, moments: Any, batch: jdpo.PackedBatch) -> tuple[Any, Any, jax.Array]:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(policy, None, batch)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(policy, updates), moments, loss

    moments, rng, losses = optimizer.init(policy), np.random.default_rng(0), []
    for chunk in (part for _ in range(5) for part in np.split(rng.permutation(64), 4)):
        batch = jax.device_put(pack([rows[i] for i in chunk], reference_logps=[cached[i] for i in chunk]), by_row)
        policy, moments, loss = step(policy, moments, batch)
        losses.append(float(loss))

    # The same pairs as a padded batch on one device, with the reference computed again: the same loss and gradients.
    padded_loss = jax.jit(jax.value_and_grad(jdpo.make_dpo_loss(padded_logits), has_aux=True))
    same = padded_loss(jax.device_get(policy), params, padded([rows[i] for i in chunk]))
    packed = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(policy, None, batch)
    apart = difference(packed, same)
    assert apart < 1e-5, apart
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; packed and padded differ by at most {apart:.0e}")
    return losses
