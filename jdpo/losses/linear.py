"""From hidden states to token log-probabilities through the LM head, without ever holding the logits of all tokens.

Axes: r rows, k positions of a row, n tokens, d model, v vocabulary, c positions of a row in one chunk, m chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

Array = Any

CHUNK_BYTES = 48 * 2**20
"""What the logits of a chunk take up at most, where the caller leaves its size open..."""
MIN_CHUNK_TOKENS = 256
"""... unless that were fewer tokens than this: below it, a chunk reads and writes more weights than it computes."""
MAX_SHARDS = 256
"""Tokens in one axis [n] may lie in up to this many shards (a power of two that divides n) and stay where they are."""


class _Settings(NamedTuple):
    """What is known before tracing; hashable."""

    softcap: float | None
    scale: float | None
    with_sum_sq: bool


def linear_token_logps(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    chunk_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_log_sum_sq: bool = False,
) -> Any:
    """Log-probability of each target token, from the hidden states in front of the LM head.

    As `token_logps(hidden @ head, targets)`, in value and gradient, but logits exist for one chunk of tokens at a
    time, forward and backward; the backward pass computes them a second time. Kept for it: the inputs and one or two
    float32 numbers a token. Not for forward-mode differentiation (jax.jvp).

    logits = hidden @ head, then times logit_scale, then logit_softcap * tanh(logits / logit_softcap); the matrix
    products take the operands' dtype and accumulate in float32, everything behind them is float32 (float64 stays).

    A chunk is the next few positions of every row, so that rows may lie on different devices: no hidden state moves.
    The head's gradient is summed over devices once, after the last chunk, where the rows are sharded over explicit
    mesh axes (jax.make_mesh's default) or within jax.shard_map over their axes, given the head whole. Over automatic
    axes GSPMD sums it once a chunk: call it within shard_map there. The vocabulary of the head may be sharded over
    explicit and automatic axes, not over those of a shard_map.

    Args:
      hidden: float [r, k, d], rows of k positions; or [n, d], tokens in one axis, which may be sharded too.
      head: float [d, v], without a bias.
      targets: int [r, k] or [n], ids in [0, v).
      chunk_size: positions of each row at once; for [n, d] the most tokens at once. Default: as many as have logits of
        48 MiB, but at least 256 tokens, and at most half of all. Rows and tokens count as this call sees them: those
        of one device within shard_map and over explicit axes, else all. Positions that chunks do not divide are padded
        within their row, by less than one a chunk.
      logit_softcap: bound of the logits, above 0 (Gemma 2); None for none.
      logit_scale: factor of the logits, before the cap (Cohere, Granite); None for 1.
      return_log_sum_sq: also return log sum_v p_v^2 (WPO's weight is the log-prob minus it).

    Returns:
      float32 [r, k] or [n], natural log; with return_log_sum_sq a pair of such arrays, both differentiable. A token's
      results depend on no other token, NaN included.

    Raises:
      ValueError: shapes that do not fit, targets that are no integers, chunk_size below 1, logit_softcap not above 0.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> linear_token_logps(hidden, head, jnp.array([1, 0])).round(3).tolist()
    [-0.28800..., -0.69300...]
    """
    hidden, head, targets = (jnp.asarray(array) for array in (hidden, head, targets))
    _check(hidden, head, targets, chunk_size, logit_softcap)
    targets = targets.astype(jnp.int32)  # a narrow type could not count the vocabulary
    settings = _Settings(_number(logit_softcap), _number(logit_scale), return_log_sum_sq)
    results = _over_explicit_axes(partial(_on_rows, chunk_size, settings), hidden, head, targets)
    return results if return_log_sum_sq else results[0]


def _check(hidden: Array, head: Array, targets: Array, chunk_size: int | None, softcap: float | None) -> None:
    if hidden.ndim not in (2, 3) or head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"expected hidden [r, k, d] or [n, d] and head [d, v], found hidden {hidden.shape} and head {head.shape}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {hidden.shape[:-1]} for hidden {hidden.shape}, found {targets.shape}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets are token ids: expected an integer dtype, found {targets.dtype}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size counts positions: expected at least 1 (or None), found {chunk_size}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap bounds the logits: expected above 0 (or None), found {softcap}")


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _on_rows(chunk: int | None, settings: _Settings, hidden: Array, head: Array, targets: Array) -> tuple[Array, ...]:
    """Chooses the chunk and makes [n, d] rows: on arrays as large as one device, or GSPMD's program, sees them."""
    flat = hidden.ndim == 2
    if flat:
        tokens = chunk or _default_chunk(1, hidden.shape[0], head.shape[1])
        rows = _num_rows(hidden.shape[0], tokens)
        hidden, targets = rearrange(hidden, "(r k) d -> r k d", r=rows), rearrange(targets, "(r k) -> r k", r=rows)
        chunk = tokens // rows
    rows, positions = targets.shape
    chunk = max(min(chunk or _default_chunk(rows, positions, head.shape[1]), positions), 1)
    results = _token_logps(chunk, settings, *_varying_alike(hidden, head, targets))
    return tuple(rearrange(result, "r k -> (r k)") for result in results) if flat else results


def _default_chunk(rows: int, positions: int, vocabulary: int) -> int:
    """Positions of a row at once, by CHUNK_BYTES and MIN_CHUNK_TOKENS; no more than half of them."""
    tokens = max(CHUNK_BYTES // (4 * vocabulary), MIN_CHUNK_TOKENS)
    return max(min(tokens // max(rows, 1), -(-positions // 2)), 1)


def _num_rows(size: int, tokens: int) -> int:
    """How many rows `size` tokens are seen as, each a contiguous block of them.

    A chunk takes as many tokens from every row. Where the number of shards of the tokens divides that of the rows,
    it takes as many from every shard, and none has to move: so all the factors of two that there are.
    """
    factors_of_two = max(size & -size, 1)
    return min(factors_of_two, 1 << (tokens.bit_length() - 1), MAX_SHARDS)


def _over_explicit_axes(local: Callable[..., Any], hidden: Array, head: Array, targets: Array) -> Any:
    """Calls `local`; over shards of rows, where the arrays' types tell how they are sharded (explicit mesh axes).

    The head is made whole along the axes of the rows, once; other axes (a vocabulary's) are left to GSPMD.
    """
    shardings = [jax.typeof(array).sharding for array in (hidden, head, targets)]
    mesh = next((sharding.mesh for sharding in shardings if any(sharding.spec)), None)
    if mesh is None:
        return local(hidden, head, targets)
    row_axes = _axis_names(shardings[0].spec[0])
    others = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit and name not in row_axes
    )
    by_row = P(row_axes or None)
    whole = P(*(tuple(name for name in _axis_names(dim) if name not in row_axes) or None for dim in shardings[1].spec))
    head, targets = reshard(head, NamedSharding(mesh, whole)), reshard(targets, NamedSharding(mesh, by_row))

    def over_rows(*arrays: Array) -> Any:
        return jax.shard_map(
            local,
            mesh=jax.typeof(arrays[0]).sharding.mesh,
            in_specs=(by_row, P(), by_row),
            out_specs=by_row,
            axis_names=set(row_axes),
        )(*arrays)

    call = over_rows if row_axes else local
    if others:
        call = auto_axes(call, axes=others, out_sharding=NamedSharding(mesh, by_row))
    return call(hidden, head, targets)


def _axis_names(dim: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if dim is None else dim if isinstance(dim, tuple) else (dim,)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Marks each array as varying over the manual mesh axes that any of them varies over.

    Within jax.shard_map a head shared by all devices meets rows that differ. Marked here, it gets its gradient
    summed over devices by this mark's own transpose: once, after the last chunk.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[str]().union(*varying)
    return [
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def _chunks(array: Array, chunk: int) -> Array:
    """[r, k, ...] -> [r, m, c, ...] with c at most `chunk`, zeros behind the last position."""
    positions = array.shape[1]
    number = max(-(-positions // chunk), 1)
    length = max(-(-positions // number), 1)  # even chunks: 10 positions by 8 are 5 + 5, without padding
    padding = [(0, number * length - positions if axis == 1 else 0) for axis in range(array.ndim)]
    return rearrange(jnp.pad(array, padding), "r (m c) ... -> r m c ...", c=length)


def _scan_positions(body: Any, carry: Any, arrays: tuple[Array, ...], chunk: int) -> tuple[Any, tuple[Array, ...]]:
    """`lax.scan` over chunks of the second axis of `arrays` [r, k, ...], leaving the first where it is."""
    positions = arrays[0].shape[1]
    chunked = tuple(_chunks(array, chunk) for array in arrays)

    def step(carry: Any, index: Array) -> Any:
        # Indexed inside, not scanned over: a scan wants its axis in front, and moving it copies every hidden state.
        return body(carry, *(jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False) for x in chunked))

    carry, results = jax.lax.scan(step, carry, jnp.arange(chunked[0].shape[1]))
    return carry, tuple(rearrange(x, "m r c ... -> r (m c) ...")[:, :positions] for x in results)


def _dot(equation: str, left: Array, right: Array) -> Array:
    """Matrix product in the operands' dtype, accumulated and returned in float32 or wider."""
    dtype = jnp.promote_types(jnp.promote_types(left.dtype, right.dtype), jnp.float32)
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _logits(settings: _Settings, hidden_rcd: Array, head: Array) -> Array:
    logits_rcv = _dot("rcd,dv->rcv", hidden_rcd, head)
    if settings.scale is not None:
        logits_rcv = logits_rcv * settings.scale
    if settings.softcap is not None:
        logits_rcv = settings.softcap * jnp.tanh(logits_rcv / settings.softcap)
    return logits_rcv


def _is_target(targets_rc: Array, vocabulary: int) -> Array:
    # Compared, not gathered or scattered: the vocabulary may be sharded.
    return targets_rc[..., None] == jnp.arange(vocabulary)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logps(
    chunk: int, settings: _Settings, hidden_rkd: Array, head: Array, targets_rk: Array
) -> tuple[Array, ...]:
    return _forward(chunk, settings, hidden_rkd, head, targets_rk)[0]


def _forward(
    chunk: int, settings: _Settings, hidden_rkd: Array, head: Array, targets_rk: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    def body(carry: None, hidden_rcd: Array, targets_rc: Array) -> tuple[None, tuple[Array, ...]]:
        logits = _logits(settings, hidden_rcd, head)
        highest = logits.max(-1)
        weights = jnp.exp(logits - highest[..., None])
        log_sum = jnp.log(weights.sum(-1))
        target_logit = jnp.where(_is_target(targets_rc, head.shape[1]), logits, 0).sum(-1)
        log_sum_sq = [jnp.log(jnp.square(weights).sum(-1)) - 2 * log_sum] if settings.with_sum_sq else []
        return carry, (target_logit - highest - log_sum, highest + log_sum, *log_sum_sq)

    _, (logps, log_sum_exp, *log_sum_sq) = _scan_positions(body, None, (hidden_rkd, targets_rk), chunk)
    return (logps, *log_sum_sq), (hidden_rkd, head, targets_rk, log_sum_exp, *log_sum_sq)


def _backward(
    chunk: int, settings: _Settings, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, None]:
    """With p the softmax of the logits z: d logp / dz = onehot - p, d log_sum_sq / dz = 2 (p^2 / sum p^2 - p)."""
    hidden_rkd, head, targets_rk, *per_token = residuals

    def body(d_head: Array, hidden_rcd: Array, targets_rc: Array, *per_token_rc: Array) -> tuple[Array, tuple[Array]]:
        log_sum_exp, g_logps, *sum_sq = (x[..., None] for x in per_token_rc)
        logits = _logits(settings, hidden_rcd, head)
        log_p = logits - log_sum_exp
        p = jnp.exp(log_p)
        d_logits = g_logps * (_is_target(targets_rc, head.shape[1]) - p)
        if settings.with_sum_sq:
            log_sum_sq, g_sum_sq = sum_sq
            d_logits += 2 * g_sum_sq * (jnp.exp(2 * log_p - log_sum_sq) - p)
        if settings.softcap is not None:
            d_logits *= 1 - jnp.square(logits / settings.softcap)
        if settings.scale is not None:
            d_logits *= settings.scale
        # In the operands' dtype for both products: float32 beside bfloat16 would make them slow ones.
        d_logits = d_logits.astype(jnp.promote_types(hidden_rcd.dtype, head.dtype))
        d_hidden = _dot("rcv,dv->rcd", d_logits, head).astype(hidden_rcd.dtype)
        return d_head + _dot("rcd,rcv->dv", hidden_rcd, d_logits), (d_hidden,)

    log_sum_exp, *log_sum_sq = per_token
    g_logps, *g_sum_sq = cotangents
    zeros = jnp.zeros_like(head, dtype=jnp.promote_types(head.dtype, jnp.float32))
    arrays = (hidden_rkd, targets_rk, log_sum_exp, g_logps, *log_sum_sq, *g_sum_sq)
    d_head, (d_hidden,) = _scan_positions(body, zeros, arrays, chunk)
    return d_hidden, d_head.astype(head.dtype), None


_token_logps.defvjp(_forward, _backward)
