"""A flax.linen model on packed batches, on 8 devices, with a cached reference: two lines of the model change."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from packed_training import train_packed
from toy_pairs import LENGTH, VOCAB, WIDTH

import jdpo
from jdpo.losses import packed_token_logps


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


if __name__ == "__main__":
    train_packed(packed_logps, padded_logits, PARAMS)
