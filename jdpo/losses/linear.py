"""Log-probabilities of tokens from hidden states through the LM head, without the logits of all tokens at once.

Axes: r rows, k positions of a row, n tokens, d model, v vocabulary, c positions of a row in one chunk, m chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from jdpo.losses.linear_chunks import HeadSettings, default_chunk, row_token_logps
from jdpo.types import AnyArray

Array = jax.Array

MAX_SHARDS = 256
"""Tokens in one axis [n] can be in up to this many shards (a power of two that divides n) without being moved."""


@overload
def linear_token_logps(
    hidden: Array,
    head: Array,
    targets: AnyArray,
    *,
    lengths: Array | None = ...,
    chunk_size: int | None = ...,
    logit_softcap: float | None = ...,
    logit_scale: float | None = ...,
    return_log_sum_sq: Literal[False] = ...,
) -> Array: ...
@overload
def linear_token_logps(
    hidden: Array,
    head: Array,
    targets: AnyArray,
    *,
    lengths: Array | None = ...,
    chunk_size: int | None = ...,
    logit_softcap: float | None = ...,
    logit_scale: float | None = ...,
    return_log_sum_sq: bool,
) -> Any: ...


def linear_token_logps(
    hidden: Array,
    head: Array,
    targets: AnyArray,
    *,
    lengths: Array | None = None,
    chunk_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_log_sum_sq: bool = False,
) -> Any:
    """Computes the log-probability of each target token from the hidden states before the LM head.

    Values and gradients are those of `token_logps(hidden @ head, targets)`, but logits exist only for one chunk of
    tokens at a time, forward and backward; the backward pass computes them again. It keeps the inputs and one or two
    float32 numbers per token. Forward-mode differentiation (jax.jvp) is not supported.

    logits = hidden @ head, then times logit_scale, then logit_softcap * tanh(logits / logit_softcap). Matrix products
    use the dtype of the operands and accumulate in float32; everything after them is float32 (float64 for float64).

    A chunk is the next few positions of every row, so rows can be on different devices and no hidden state moves. The
    gradient of the head is summed over devices once, after the last chunk, if the rows are sharded over explicit mesh
    axes (the default of jax.make_mesh), or within jax.shard_map over their axes with the whole head. Over automatic
    axes, GSPMD sums it once per chunk: call this function within shard_map there. The vocabulary of the head can be
    sharded over explicit and automatic axes, but not over those of a shard_map.

    Args:
      hidden: float [r, k, d], rows of k positions; or [n, d], tokens in one axis, which can be sharded too.
      head: float [d, v], without a bias.
      targets: int [r, k] or [n], ids in [0, v).
      lengths: int [r], the number of leading positions of each row that count. Results after them are 0, have no
        gradient and do not depend on the values there, not even NaN. Chunks after the longest row are not computed,
        neither forward nor backward. Within shard_map, and over explicit axes, each device uses its own rows.
      chunk_size: positions of each row per chunk; for [n, d], the maximum tokens per chunk. Default: as many as have
        logits of 48 MiB, but at least 256 tokens, and at most half of all (with lengths: a quarter, if that is at least
        256 tokens). Rows and tokens are counted as this call sees them: those of one device within shard_map and over
        explicit axes, else all. Positions that chunks do not divide are padded within their row, by less than one per
        chunk.
      logit_softcap: bound of the logits, above 0 (Gemma 2); None: no bound.
      logit_scale: factor of the logits, before the bound (Cohere, Granite); None: 1.
      return_log_sum_sq: also return log sum_v p_v^2, which WPO subtracts from the log-prob.

    Returns:
      float32 [r, k] or [n], natural logarithms; with return_log_sum_sq, two such arrays, both differentiable. The
      results of a token depend on no other token, even if that is NaN.

    Raises:
      ValueError: shapes that do not match, targets or lengths that are not integers, chunk_size below 1, or
        logit_softcap not above 0.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> linear_token_logps(hidden, head, jnp.array([1, 0])).round(3).tolist()
    [-0.28800..., -0.69300...]
    """
    hidden, head, ids = (jnp.asarray(array) for array in (hidden, head, targets))
    _check(hidden, head, ids, chunk_size, logit_softcap)
    ids = ids.astype(jnp.int32)  # A narrow type could not hold the size of the vocabulary.
    settings = HeadSettings(_number(logit_softcap), _number(logit_scale), return_log_sum_sq)
    counts = [] if lengths is None else [_checked_lengths(lengths, hidden)]
    results = _over_explicit_axes(partial(_on_rows, chunk_size, settings), head, hidden, ids, *counts)
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
    """Chooses the chunk and turns [n, d] into rows; sizes are those of one device, or of the program of GSPMD."""
    flat = hidden.ndim == 2
    if flat:
        tokens = chunk or default_chunk(1, hidden.shape[0], head.shape[1])
        rows = _num_rows(hidden.shape[0], tokens)
        hidden, targets = rearrange(hidden, "(r k) d -> r k d", r=rows), rearrange(targets, "(r k) -> r k", r=rows)
        chunk = tokens // rows  # a chunk has this many tokens of every row, so of every shard
    results = row_token_logps(settings, hidden, head, targets, lengths, chunk=chunk)
    return tuple(rearrange(result, "r k -> (r k)") for result in results) if flat else results


def _num_rows(size: int, tokens: int) -> int:
    """Returns the number of rows, contiguous blocks of equal size, that `size` tokens are divided into.

    A chunk takes the same number of tokens from every row. If the number of shards divides the number of rows, it takes
    the same number from every shard and no token moves. So the result has all factors of two that `size` has.
    """
    # size & -size is the lowest bit that is set: the largest power of two that divides size.
    factors_of_two = max(size & -size, 1)
    # No more rows than a chunk has tokens, as it takes at least one of each row.
    return min(factors_of_two, 1 << (tokens.bit_length() - 1), MAX_SHARDS)


def _over_explicit_axes(local: Callable[..., Any], head: Array, *of_rows: Array) -> Any:
    """Calls `local` on each shard of rows if the arrays are sharded over explicit mesh axes, else on whole arrays.

    The head is gathered along the axes of the rows, once; other axes (of the vocabulary) are left to GSPMD.
    """
    of_head, *shardings = (jax.typeof(array).sharding for array in (head, *of_rows))
    mesh = next((sharding.mesh for sharding in (*shardings, of_head) if any(sharding.spec)), None)
    if mesh is None:
        return local(head, *of_rows)
    row_axes = _axis_names(shardings[0].spec[0])  # Those of the hidden states; targets and lengths follow.
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
            # Manual over the axes of the rows alone; the vocabulary is left to GSPMD.
            axis_names=set(row_axes),
        )(*arrays)

    call = over_rows if row_axes else local
    if others:
        # Over explicit axes, a product that sums over the vocabulary would have to name the sharding of its result.
        call = auto_axes(call, axes=others, out_sharding=NamedSharding(mesh, by_row))
    return call(head, *of_rows)


def _axis_names(dim: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return () if dim is None else dim if isinstance(dim, tuple) else (dim,)
