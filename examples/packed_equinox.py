"""An equinox model on packed batches, on 8 devices, with a cached reference: written for one row, run under vmap."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from packed_training import train_packed
from toy_pairs import LENGTH, VOCAB, WIDTH

import jdpo
from jdpo.losses import packed_token_logps


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


if __name__ == "__main__":
    train_packed(packed_logps, padded_logits, PARAMS)
