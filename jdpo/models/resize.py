"""More vocabulary for a model: rows for tokens that a chat template adds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jdpo.models.transformer import Params, Transformer

NOISE_SCALE = 0.02
"""Spread of new rows around the mean row, as a share of the old rows' own: enough to tell new tokens apart."""


def resize_embeddings(
    params: Params, model: Transformer, new_vocab_size: int, key: jax.Array
) -> tuple[Params, Transformer]:
    """Grows the embedding, and an untied head, to new_vocab_size rows; returns new params and the model for them.

    New rows are the mean of the old ones plus a little noise: a new token starts as probable as an average one.
    Shardings are kept, but for a vocabulary axis that the mesh no longer divides: that axis is then replicated.

    Raises:
      ValueError: new_vocab_size is smaller than the vocabulary.
    """
    old_vocab_size = model.config.vocab_size
    if new_vocab_size < old_vocab_size:
        raise ValueError(
            f"the embedding has {old_vocab_size} rows and cannot shrink to {new_vocab_size}: "
            "tokens would lose their vectors"
        )
    new_model = model.clone(config=dataclasses.replace(model.config, vocab_size=new_vocab_size))
    if new_vocab_size == old_vocab_size:
        return params, new_model
    embedding_key, head_key = jax.random.split(key)
    new_params = dict(params)
    embedding = _grow(params["embed"]["embedding"], new_vocab_size, 0, embedding_key)
    new_params["embed"] = {**params["embed"], "embedding": embedding}
    if not model.config.tie_embeddings:
        kernel = _grow(params["lm_head"]["kernel"], new_vocab_size, 1, head_key)
        new_params["lm_head"] = {**params["lm_head"], "kernel": kernel}
    return new_params, new_model


def _grow(leaf: jax.Array, new_size: int, axis: int, key: jax.Array) -> jax.Array:
    def grow(leaf: jax.Array, key: jax.Array) -> jax.Array:
        rows = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        mean, spread = rows.mean(axis, keepdims=True), rows.std(axis, keepdims=True)
        shape = list(leaf.shape)
        shape[axis] = new_size - leaf.shape[axis]
        noise = jax.random.normal(key, shape, rows.dtype)
        return jnp.concatenate([leaf, (mean + NOISE_SCALE * spread * noise).astype(leaf.dtype)], axis)

    return jax.jit(grow, out_shardings=_fitting(leaf.sharding, leaf.ndim, axis, new_size))(leaf, key)


def _fitting(sharding: Sharding, ndim: int, axis: int, new_size: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *([None] * (ndim - len(sharding.spec)))]
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    num_parts = 1
    for name in names:
        num_parts *= sharding.mesh.shape[name] if name is not None else 1
    if new_size % num_parts:
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
