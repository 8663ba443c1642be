"""A flax.linen model on packed batches, on 8 devices, with a cached reference: two lines of the model change."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_pairs import LENGTH, VOCAB, WIDTH, difference, padded, toy_rows

import jdpo
from jdpo.losses import packed_token_logps

jax.config.update("jax_num_cpu_devices", 8)  # without 8 GPUs or TPUs: as many fake devices of the CPU


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, positions: Any, attention: Any) -> Any:
        x = nn.Embed(VOCAB, WIDTH)(tokens) + nn.Embed(LENGTH, WIDTH)(positions)  # positions: those of the batch
        query, key, value = (nn.DenseGeneral((2, WIDTH // 2))(x) for _ in range(3))
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(attention(query, key, value))  # attention: wrapped
        return nn.Dense(VOCAB)(nn.gelu(nn.Dense(2 * WIDTH)(x)))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> Any:
    same_segment = nn.make_attention_mask(segment_ids, segment_ids, jnp.equal)
    mask = nn.combine_masks(nn.make_causal_mask(segment_ids), same_segment)
    return nn.dot_product_attention(query, key, value, mask=mask)


MODEL = Model()
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, LENGTH), int), jnp.arange(LENGTH), lambda query, key, value: value)


def packed_logps(params: Any, batch: jdpo.PackedBatch) -> jax.Array:
    logits: Any = MODEL.apply(params, batch.tokens, batch.positions, jdpo.packed_attention(attend, batch))
    return packed_token_logps(logits, batch)


def padded_logits(params: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    return MODEL.apply(params, tokens, jnp.arange(LENGTH), partial(attend, segment_ids=mask))


def main() -> list[float]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    # One row of slots per device, and the same sizes in every step, so that the step is compiled once.
    pack = partial(jdpo.pack, num_rows=8, num_slots=64, num_pairs=3, length=LENGTH, num_scored=64)
    rows, loss_fn, optimizer = toy_rows(64), jdpo.make_dpo_loss(packed_logps), optax.adam(3e-3)
    policy = reference = jax.device_put(PARAMS, everywhere)

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
    same = padded_loss(jax.device_get(policy), PARAMS, padded([rows[i] for i in chunk]))
    packed = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(policy, None, batch)
    apart = difference(packed, same)
    assert apart < 1e-5, apart
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; packed and padded differ by at most {apart:.0e}")
    return losses


if __name__ == "__main__":
    main()
