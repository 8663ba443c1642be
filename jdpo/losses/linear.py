"""From hidden states to token log-probabilities through the LM head, without ever holding the logits of all tokens.

Axes: r rows, k positions of a row, n tokens, d model, v vocabulary, c positions of a row in one chunk, m chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from jdpo.losses.linear_chunks import HeadSettings, default_chunk, row_token_logps

Array = jax.Array

MAX_SHARDS = 256
"""Tokens in one axis [n] may lie in up to this many shards (a power of two that divides n) and stay where they are."""


def linear_token_logps(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    lengths: Array | None = None,
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
      lengths: int [r], for rows: how many leading positions of each row count. Results behind are 0, get no gradient
        and do not depend on what stands there, NaN included; chunks behind the longest row are not computed, neither
        forward nor backward. Within shard_map, and over explicit axes, each device goes by its own rows.
      chunk_size: positions of each row at once; for [n, d] the most tokens at once. Default: as many as have logits of
        48 MiB, but at least 256 tokens, and at most half of all (with lengths a quarter, where that is 256 tokens).
        Rows and tokens count as this call sees them: those of one device within shard_map and over explicit axes, else
        all. Positions that chunks do not divide are padded within their row, by less than one a chunk.
      logit_softcap: bound of the logits, above 0 (Gemma 2); None for none.
      logit_scale: factor of the logits, before the cap (Cohere, Granite); None for 1.
      return_log_sum_sq: also return log sum_v p_v^2 (WPO's weight is the log-prob minus it).

    Returns:
      float32 [r, k] or [n], natural log; with return_log_sum_sq a pair of such arrays, both differentiable. A token's
      results depend on no other token, NaN included.

    Raises:
      ValueError: shapes that do not fit, targets or lengths that are no integers, chunk_size below 1, logit_softcap not
        above 0.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> linear_token_logps(hidden, head, jnp.array([1, 0])).round(3).tolist()
    [-0.28800..., -0.69300...]
    """
    hidden, head, targets = (jnp.asarray(array) for array in (hidden, head, targets))
    _check(hidden, head, targets, chunk_size, logit_softcap)
    targets = targets.astype(jnp.int32)  # a narrow type could not count the vocabulary
    settings = HeadSettings(_number(logit_softcap), _number(logit_scale), return_log_sum_sq)
    counts = [] if lengths is None else [_checked_lengths(lengths, hidden)]
    results = _over_explicit_axes(partial(_on_rows, chunk_size, settings), head, hidden, targets, *counts)
    return results if return_log_sum_sq else results[0]


def _checked_lengths(lengths: Array, hidden: Array) -> Array:
    lengths = jnp.asarray(lengths)
    if hidden.ndim != 3 or lengths.shape != hidden.shape[:1]:
        raise ValueError(
            f"lengths count positions of rows: expected hidden [r, k, d] and lengths [r], found hidden {hidden.shape} "
            f"and lengths {lengths.shape}"
        )
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths count positions: expected an integer dtype, found {lengths.dtype}")
    return lengths.astype(jnp.int32)


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


def _on_rows(
    chunk: int | None, settings: HeadSettings, head: Array, hidden: Array, targets: Array, lengths: Array | None = None
) -> tuple[Array, ...]:
    """Chooses the chunk and makes [n, d] rows: on arrays as large as one device, or GSPMD's program, sees them."""
    flat = hidden.ndim == 2
    if flat:
        tokens = chunk or default_chunk(1, hidden.shape[0], head.shape[1])
        rows = _num_rows(hidden.shape[0], tokens)
        hidden, targets = rearrange(hidden, "(r k) d -> r k d", r=rows), rearrange(targets, "(r k) -> r k", r=rows)
        chunk = tokens // rows
    results = row_token_logps(settings, hidden, head, targets, lengths, chunk=chunk)
    return tuple(rearrange(result, "r k -> (r k)") for result in results) if flat else results


def _num_rows(size: int, tokens: int) -> int:
    """How many rows `size` tokens are seen as, each a contiguous block of them.

    A chunk takes as many tokens from every row. Where the number of shards of the tokens divides that of the rows,
    it takes as many from every shard, and none has to move: so all the factors of two that there are.
    """
    factors_of_two = max(size & -size, 1)
    return min(factors_of_two, 1 << (tokens.bit_length() - 1), MAX_SHARDS)


def _over_explicit_axes(local: Callable[..., Any], head: Array, *of_rows: Array) -> Any:
    """Calls `local`; over shards of rows, where the arrays' types tell how they are sharded (explicit mesh axes).

    The head is made whole along the axes of the rows, once; other axes (a vocabulary's) are left to GSPMD.
    """
    of_head, *shardings = (jax.typeof(array).sharding for array in (head, *of_rows))
    mesh = next((sharding.mesh for sharding in (*shardings, of_head) if any(sharding.spec)), None)
    if mesh is None:
        return local(head, *of_rows)
    row_axes = _axis_names(shardings[0].spec[0])  # of the hidden states; targets and lengths follow
    others = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit and name not in row_axes
    )
    by_row = P(row_axes or None)
    whole = P(*(tuple(name for name in _axis_names(dim) if name not in row_axes) or None for dim in of_head.spec))
    head = reshard(head, NamedSharding(mesh, whole))
    of_rows = (of_rows[0], *(reshard(array, NamedSharding(mesh, by_row)) for array in of_rows[1:]))

    def over_rows(*arrays: Array) -> Any:
        return jax.shard_map(
            local,
            mesh=jax.typeof(arrays[0]).sharding.mesh,
            in_specs=(P(), *[by_row] * len(of_rows)),
            out_specs=by_row,
            axis_names=set(row_axes),
        )(*arrays)

    call = over_rows if row_axes else local
    if others:
        call = auto_axes(call, axes=others, out_sharding=NamedSharding(mesh, by_row))
    return call(head, *of_rows)


def _axis_names(dim: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if dim is None else dim if isinstance(dim, tuple) else (dim,)
