"""Log-probabilities of single tokens: of those of an answer, and of all that may come next.

Axes: r rows (equal ones, one per shard of the batch), t positions, c positions of a chunk, d model, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdpo.models.transformer import Params, Transformer, Weights, variables
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.on_mesh import OnMesh

_LEAST_COLUMNS = 16
"""Shorter sequences share one compiled shape; longer ones are padded to a power of two."""

_CHUNK = 128
"""Positions whose logits exist at the same time: those of a long answer would be gigabytes."""


class TokenLogps(NamedTuple):
    """The log-probability of each token of an answer.

    Attributes:
      tokens: the token ids, as training learns them: the end of the turn included.
      pieces: the text that each token adds; together they are the text of the answer.
      logps: the log-probability of each token after the prompt and the tokens before it, float32.
    """

    tokens: list[int]
    pieces: list[str]
    logps: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the whole answer."""
        return float(np.sum(np.array(self.logps, np.float64)))


class NextToken(NamedTuple):
    """A token that may come next.

    Attributes:
      token: its id.
      piece: the text that it adds.
      logp: its log-probability.
    """

    token: int
    piece: str
    logp: float


def completion_logps(
    model: Transformer, params: Params | Weights, mesh: Mesh, prompt: Sequence[int], completion: Sequence[int]
) -> np.ndarray:
    """Returns the log-probability of each token of a completion after those before it, float32.

    Raises:
      ValueError: the tokens are more than the model has positions.
    """
    ids = [*prompt, *completion]
    tokens, mask = _padded(ids, model, mesh)
    targets = np.zeros(tokens.shape[1], np.int32)
    # Position t predicts token t + 1.
    targets[: len(ids) - 1] = ids[1:]
    logps = OnMesh(mesh, functools.partial(_target_logps, model=model))(params, tokens, mask, targets)
    return np.asarray(logps)[len(prompt) - 1 : len(ids) - 1]


def next_logps(model: Transformer, params: Params | Weights, mesh: Mesh, ids: Sequence[int]) -> np.ndarray:
    """Returns the log-probability of every token of the vocabulary after some tokens, float32 [v].

    Raises:
      ValueError: the tokens are more than the model has positions.
    """
    tokens, mask = _padded(ids, model, mesh)
    logps = OnMesh(mesh, functools.partial(_next_logps, model=model))(params, tokens, mask, np.int32(len(ids) - 1))
    return np.asarray(logps)


def _padded(ids: Sequence[int], model: Transformer, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32 [r, t] and mask bool [r, t], padded on the right."""
    most = model.config.max_positions
    if len(ids) > most:
        raise ValueError(f"prompt and answer have {len(ids)} tokens, more than the model's {most} positions")
    columns = max(_LEAST_COLUMNS, 1 << (len(ids) - 1).bit_length())
    # Equal rows, since a mesh cannot split a single one.
    tokens = np.zeros((num_batch_shards(mesh), columns), np.int32)
    tokens[:, : len(ids)] = ids
    mask = np.zeros(tokens.shape, bool)
    mask[:, : len(ids)] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnames="model")
def _target_logps(
    params: Params | Weights, tokens: jax.Array, mask: jax.Array, targets: jax.Array, *, model: Transformer
) -> jax.Array:
    """Returns the log-probability [t] of the target after each position."""
    hidden = model.apply(variables(params), tokens, mask, method="hidden_states")
    columns = tokens.shape[1]
    size = min(_CHUNK, columns)  # both are powers of two

    def of_chunk(start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=1)
        logps = _log_softmax(model.apply(variables(params), part, method="logits")[0])
        here = jax.lax.dynamic_slice_in_dim(targets, start, size)
        return jnp.take_along_axis(logps, here[:, None], axis=-1)[:, 0]

    return jax.lax.map(of_chunk, jnp.arange(0, columns, size)).reshape(columns)


@functools.partial(jax.jit, static_argnames="model")
def _next_logps(
    params: Params | Weights, tokens: jax.Array, mask: jax.Array, last: jax.Array, *, model: Transformer
) -> jax.Array:
    hidden = model.apply(variables(params), tokens, mask, method="hidden_states")
    part = jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
    return _log_softmax(model.apply(variables(params), part, method="logits")[0, 0])


def _log_softmax(logits: jax.Array) -> jax.Array:
    # In float32, whatever the model's dtype.
    return jax.nn.log_softmax(logits.astype(jnp.float32))
