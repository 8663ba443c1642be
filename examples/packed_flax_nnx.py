"""A flax.nnx model on packed batches, on 8 devices, with a cached reference: two lines of the model change."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from packed_training import train_packed
from toy_pairs import LENGTH, VOCAB, WIDTH

import jdpo
from jdpo.losses import packed_token_logps


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


if __name__ == "__main__":
    train_packed(packed_logps, padded_logits, PARAMS)
