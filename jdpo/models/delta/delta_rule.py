"""The gated delta rule: chunked over whole sequences, and one token at a time.

Axes: n sequences, t places, c chunks, i and j places of a chunk, g key heads, m value heads of a key head, k key width,
v value width; p prompts, r rows of a prompt.

A head has a state S [k, v], which predicts values from keys. Each token lets it decay, moves its prediction for the
token's key towards the token's value, and reads it (Gated DeltaNet, https://arxiv.org/abs/2412.06464):

    S <- exp(log_decay) S
    S <- S + key (beta (value - key S))     an outer product
    output = query S                        with the new state

Within a chunk the corrections depend on each other through a triangular system, whose inverse turns them into matrix
products (section 3.3); only the states at the starts of chunks are computed one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jdpo.models.layers import wide_product

CHUNK = 64
"""Places of a chunk: as many as make its products large, while the triangular system remains small."""


def state_dtype(dtype: Any) -> Any:
    """Returns the dtype of states and decays in a model that computes in `dtype`: float32 or wider.

    >>> str(state_dtype(jnp.bfloat16))
    'float32'
    """
    return jnp.promote_types(dtype, jnp.float32)


class DeltaInputs(NamedTuple):
    """The inputs of the rule, for each token.

    Attributes:
      query, key: [n, t, g, k], normalized; the rule applies no scale of its own.
      value: [n, t, g, m, v].
      log_decay: [n, t, g, m], at most 0, in float32 or wider.
      beta: [n, t, g, m], from 0 to 1, in float32 or wider. A token with log_decay and beta 0 leaves the state as it is.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    beta: jax.Array


class _Chunk(NamedTuple):
    """The parts of chunks that do not depend on the state: each with c first, so that a scan goes over them.

    Attributes:
      query, key: [c, n, g, i, k].
      values: [c, n, g, m, i, v], what the tokens would write if the state were 0 at the start of the chunk.
      readers: [c, n, g, m, i, k], how much less they write of what that state predicts.
      scores: [c, n, g, m, i, j], how much of what token j writes token i reads.
      decay_in: [c, n, g, m, i], the part of the state at the start that is left at each token; 0 in later sequences.
      decay_out: [c, n, g, m, i], the part of each token's correction that is left at the end of the chunk.
      kept: [c, n, g, m], the part of the state that is left at the end.
    """

    query: jax.Array
    key: jax.Array
    values: jax.Array
    readers: jax.Array
    scores: jax.Array
    decay_in: jax.Array
    decay_out: jax.Array
    kept: jax.Array


def gated_delta_rule(inputs: DeltaInputs, starts_nt: jax.Array, *, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Runs the rule over rows of sequences.

    Products have operands in the dtype of the values; decays, the triangular system, sums and the state are float32 or
    wider, as in transformers. Memory is linear in t: a state for each chunk, and a chunk of scores for each token.

    Args:
      starts_nt: int [n, t], the place where the sequence of each place starts, see `segment_starts`: the state is 0
        there.
      chunk: places of a chunk.

    Returns:
      the outputs [n, t, g, m, v], and the states after the last places, [n, g, m, k, v] in float32 or wider.
    """
    length, dtype = inputs.value.shape[1], inputs.value.dtype
    wide = state_dtype(dtype)
    size = min(chunk, length)
    inputs, starts_nt = _whole_chunks(inputs, starts_nt, -length % size)
    chunks = _chunks(inputs, starts_nt, size)

    # Recomputed in the backward pass, which then keeps one state per chunk and nothing else.
    @jax.checkpoint
    def advance(state: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
        read = state.astype(dtype)
        # Repeated for the value heads, so that these are a batch axis of every product. Otherwise they would be rows or
        # columns in some of them, and XLA would transpose the state, which is larger, in every step.
        query, key = (jnp.broadcast_to(x[:, :, None], chunk.readers.shape) for x in (chunk.query, chunk.key))
        written = chunk.values - wide_product("ngmik,ngmkv->ngmiv", chunk.readers, read)
        of_state = chunk.decay_in[..., None] * wide_product("ngmik,ngmkv->ngmiv", query, read)
        output = of_state + wide_product("ngmij,ngmjv->ngmiv", chunk.scores, written.astype(dtype))
        left = (chunk.decay_out[..., None] * written).astype(dtype)
        state = chunk.kept[..., None, None] * state + wide_product("ngmjk,ngmjv->ngmkv", key, left)
        return state, output.astype(dtype)

    n, _, g, m, width = inputs.value.shape
    state, outputs = jax.lax.scan(advance, jnp.zeros((n, g, m, inputs.key.shape[-1], width), wide), chunks)
    return rearrange(outputs, "c n g m i v -> n (c i) g m v")[:, :length], state


def _whole_chunks(inputs: DeltaInputs, starts_nt: jax.Array, padding: int) -> tuple[DeltaInputs, jax.Array]:
    """Adds places at the end that change nothing: their beta and log_decay are 0."""
    if not padding:
        return inputs, starts_nt
    padded = (jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)]) for x in inputs)
    # They belong to the last sequence, whose state is then the one after the last place.
    return DeltaInputs(*padded), jnp.pad(starts_nt, [(0, 0), (0, padding)], mode="edge")


def _chunks(inputs: DeltaInputs, starts_nt: jax.Array, size: int) -> _Chunk:
    query, key, value = (
        rearrange(x, "n (c i) g ... -> c n g i ...", i=size) for x in (inputs.query, inputs.key, inputs.value)
    )
    value = rearrange(value, "c n g j m v -> c n g m j v")
    log_decay, beta = (rearrange(x, "n (c i) g m -> c n g m i", i=size) for x in inputs[3:])
    dtype = value.dtype
    starts = rearrange(starts_nt, "n (c i) -> c n 1 1 i", i=size)
    place = np.arange(starts_nt.shape[1]).reshape(-1, 1, 1, 1, size)
    # Token i sees token j of its own sequence, itself included; [c, n, 1, 1, i, j].
    sees = (place[..., None, :] <= place[..., None]) & (place[..., None, :] >= starts[..., None])
    total = jnp.cumsum(log_decay, axis=-1)
    # -inf before exp: the sum over other sequences could be large, and its gradient inf times 0.
    decay = jnp.exp(jnp.where(sees, total[..., None] - total[..., None, :], -jnp.inf))
    sees_start = starts < place[..., :1]
    decay_in = jnp.where(sees_start, jnp.exp(total), 0)
    is_last = starts == starts[..., -1:]
    similar = wide_product("cngik,cngjk->cngij", key, key)[:, :, :, None]
    # Strictly lower: a token does not correct itself.
    lower = jnp.where(np.tri(size, k=-1, dtype=bool), beta[..., None] * decay * similar, 0)
    inverse = unit_lower_inverse(lower) * beta[..., None, :]
    attended = wide_product("cngik,cngjk->cngij", query, key)[:, :, :, None]
    return _Chunk(
        query,
        key,
        values=wide_product("cngmij,cngmjv->cngmiv", inverse.astype(dtype), value).astype(dtype),
        readers=wide_product("cngmij,cngjk->cngmik", (inverse * decay_in[..., None, :]).astype(dtype), key).astype(
            dtype
        ),
        scores=(attended * decay).astype(dtype),
        decay_in=decay_in,
        decay_out=jnp.exp(jnp.where(is_last, total[..., -1:] - total, -jnp.inf)),
        kept=decay_in[..., -1],
    )


@jax.custom_vjp
def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """Returns (I + L)^-1 of strictly lower triangular matrices L [.., i, i].

    Blocks of twice the size are inverted from their halves, from which only products of whole matrices are needed:

        [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]

    This is as stable as substitution. The power series of L is not, because its terms cancel for similar keys.

    >>> unit_lower_inverse(jnp.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 1.0]]
    """
    size = lower.shape[-1]
    inverse, block = jnp.eye(size, dtype=lower.dtype), 1
    while block < size:
        number = np.arange(size) // block
        # C of each pair of blocks: rows of an odd block, columns of the even one before it.
        is_corner = (number[:, None] == number + 1) & (number % 2 == 0)
        corner = jnp.where(is_corner, lower, 0)
        # The inverse of blocks of size 1 is I.
        inverse = inverse - (corner if block == 1 else _exactly(_exactly(inverse, corner), inverse))
        block *= 2
    return jnp.broadcast_to(inverse, lower.shape)


def _exactly(left: jax.Array, right: jax.Array) -> jax.Array:
    # In float32 also in a model of bfloat16: rounded to bfloat16, errors would grow from level to level.
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # d(M^-1) = -M^-1 dM M^-1: two products, where the derivative of the levels would take twice theirs.
    return (-_exactly(_exactly(inverse.mT, cotangent), inverse.mT),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def delta_step(state: jax.Array, inputs: DeltaInputs) -> tuple[jax.Array, jax.Array]:
    """Runs the rule on one token of every row.

    Args:
      state: [p, r, g, m, k, v], in float32 or wider.
      inputs: of the tokens, with axes p and r in place of n and t.

    Returns:
      the outputs [p, r, g, m, v] in the dtype of the values, and the new states.
    """
    # Sums of products, not matrix products: the state is read once whatever is computed, and stays in float32.
    query, key = (x.astype(state.dtype)[:, :, :, None, :, None] for x in (inputs.query, inputs.key))
    state = jnp.exp(inputs.log_decay)[..., None, None] * state
    predicted = (key * state).sum(-2)
    written = inputs.beta[..., None] * (inputs.value.astype(state.dtype) - predicted)
    state = state + key * written[..., None, :]
    return (query * state).sum(-2).astype(inputs.value.dtype), state
