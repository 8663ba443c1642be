"""Puts rows for the tokens that a chat template adds into the embedding and the head."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jdpo.models.transformer import Params, Transformer
from jdpo.models.weights.embedding_rows import StartedRows


def resize_embeddings(
    params: Params, model: Transformer, new_vocab_size: int, rows: StartedRows
) -> tuple[Params, Transformer]:
    """Grows the embedding, and an untied head, to new_vocab_size rows and sets the initialized ones.

    Shardings are kept, except that a vocabulary axis that the mesh no longer divides evenly is replicated.

    Args:
      rows: rows to set, see `jdpo.models.weights.embedding_rows`; all rows beyond the old vocabulary are among them.

    Returns:
      the new params, and the model for them.

    Raises:
      ValueError: new_vocab_size is smaller than the vocabulary.
    """
    old_vocab_size = model.config.vocab_size
    if new_vocab_size < old_vocab_size:
        raise ValueError(
            f"the embedding has {old_vocab_size} rows and cannot shrink to {new_vocab_size}: "
            "tokens would lose their vectors"
        )
    assert set(range(old_vocab_size, new_vocab_size)) <= set(rows.ids.tolist()), (rows.ids, new_vocab_size)
    new_model = model.clone(config=dataclasses.replace(model.config, vocab_size=new_vocab_size))
    if not len(rows.ids):
        return params, new_model
    new_params = dict(params)
    embedding = _with_rows(params["embed"]["embedding"], new_vocab_size, 0, rows.ids, rows.embedding)
    new_params["embed"] = {**params["embed"], "embedding": embedding}
    if not model.config.tie_embeddings:
        assert rows.head is not None
        kernel = _with_rows(params["lm_head"]["kernel"], new_vocab_size, 1, rows.ids, rows.head)
        new_params["lm_head"] = {**params["lm_head"], "kernel": kernel}
    return new_params, new_model


def _with_rows(leaf: jax.Array, new_size: int, axis: int, ids: np.ndarray, rows: np.ndarray) -> jax.Array:
    """Returns the leaf with an axis grown to new_size, and `rows` [n, d] at its indices `ids` [n]."""

    def change(leaf: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, 0)]
        padding[axis] = (0, new_size - leaf.shape[axis])
        # The zeros are all overwritten: every new row is among `ids`.
        grown = jnp.pad(leaf, padding)
        return grown.at[ids].set(rows) if axis == 0 else grown.at[:, ids].set(rows.T)

    rows = rows.astype(leaf.dtype)  # rounded on the host, so that the result is the same on every mesh
    sharding = _fitting(leaf.sharding, leaf.ndim, axis, new_size)
    return jax.jit(change, out_shardings=sharding)(leaf, ids.astype(np.int32), rows)


def _fitting(sharding: Sharding, ndim: int, axis: int, new_size: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *([None] * (ndim - len(sharding.spec)))]
    # A spec entry is one mesh axis, a tuple of them, or None.
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    num_parts = 1
    for name in names:
        num_parts *= sharding.mesh.shape[name] if name is not None else 1
    # A sharding needs equal parts, so the vocabulary is replicated instead.
    if new_size % num_parts:
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
