"""A flax.nnx model on packed batches, on 8 devices, with a cached reference: two lines of the model change."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_pairs import LENGTH, VOCAB, WIDTH, difference, padded, toy_rows

import jdpo
from jdpo.losses import packed_token_logps

jax.config.update("jax_num_cpu_devices", 8)  # without 8 GPUs or TPUs: as many fake devices of the CPU


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens, self.positions = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.project = nnx.LinearGeneral(WIDTH, (3, 2, WIDTH // 2), rngs=rngs)
        self.output = nnx.LinearGeneral((2, WIDTH // 2), WIDTH, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any, positions: Any, attention: Any) -> jax.Array:
        """Returns hidden states; the head is applied where its logits are needed."""
        x = self.tokens(tokens) + self.positions(positions)  # positions: those of the batch
        query, key, value = jnp.moveaxis(self.project(x), -3, 0)
        return x + self.output(attention(query, key, value))  # attention: wrapped


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=same_segment, is_causal=True)


GRAPH, PARAMS = nnx.split(Model(nnx.Rngs(0)))


def packed_logps(state: Any, batch: jdpo.PackedBatch) -> jax.Array:
    model = nnx.merge(GRAPH, state)
    hidden = model(batch.tokens, batch.positions, jdpo.packed_attention(attend, batch))
    # Hidden states and the head: no logits of prompts, and only a few logits at a time.
    return packed_token_logps(hidden, batch, model.head.kernel[...])


def padded_logits(state: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    model = nnx.merge(GRAPH, state)
    return model.head(model(tokens, jnp.arange(LENGTH), partial(attend, segment_ids=mask)))


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
