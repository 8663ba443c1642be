"""An equinox model on packed batches, on 8 devices, with a cached reference: written for one row, run under vmap."""

from functools import partial
from typing import Any

import equinox as eqx
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


class Model(eqx.Module):
    embeddings: list[eqx.nn.Embedding]
    linears: list[eqx.nn.Linear]

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 7)
        sizes = [*[WIDTH] * 4, VOCAB]
        self.embeddings = [
            eqx.nn.Embedding(size, WIDTH, key=k) for size, k in zip((VOCAB, LENGTH), keys[:2], strict=True)
        ]
        self.linears = [eqx.nn.Linear(WIDTH, size, key=k) for size, k in zip(sizes, keys[2:], strict=True)]

    def __call__(self, tokens: Any, positions: Any, attention: Any) -> jax.Array:
        """Computes the logits [s, v] of one row: tokens and positions [s], attention of queries [s, heads, width]."""
        token, place = (jax.vmap(embedding) for embedding in self.embeddings)
        *projections, output, head = (jax.vmap(linear) for linear in self.linears)
        x = token(tokens) + place(positions)  # positions: those of the batch
        query, key, value = (project(x).reshape(len(x), 2, -1) for project in projections)
        return head(x + output(attention(query, key, value).reshape(x.shape)))  # attention: wrapped


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention needs no segments: padding comes after the tokens of a sequence."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


PARAMS, STATIC = eqx.partition(Model(jax.random.key(0)), eqx.is_array)


def packed_logps(params: Any, batch: jdpo.PackedBatch) -> jax.Array:
    model = eqx.combine(params, STATIC)

    def logits_of(row: jdpo.PackedBatch) -> Any:
        return model(row.tokens, row.positions, jdpo.packed_attention(attend, row))

    return packed_token_logps(jax.vmap(logits_of)(batch), batch)


def padded_logits(params: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    model, attention = eqx.combine(params, STATIC), partial(attend, segment_ids=mask)
    return jax.vmap(lambda row: model(row, jnp.arange(LENGTH), attention))(tokens)


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
