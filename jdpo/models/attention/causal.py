"""Causal attention of rows of sequences: one function for all backends, and one for a mesh.

Axes: n rows, u sequences of a row, t places, h query heads, g key/value heads, k head width.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jdpo.models.attention.blockwise import blockwise_attention
from jdpo.models.attention.choose import check_attention
from jdpo.models.attention.cudnn import cudnn_attention
from jdpo.models.attention.segments import segment_starts
from jdpo.models.attention.splash import splash_attention
from jdpo.models.attention.xla import right_padded_attention


def causal_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    *,
    lengths: jax.Array,
    segments: jax.Array | None = None,
    sinks: jax.Array | None = None,
    backend: str,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query causal attention, [n, t, h, k]; scores and softmax in float32 or wider.

    A row holds one sequence and padding after it, or several back to back and padding after the last. A query sees the
    earlier keys of its own sequence. Outputs of padding queries are finite and arbitrary, and their cotangents must be
    zero, so that no gradient flows through padding.

    "blockwise" and "splash" run on one device's part: with several devices use `sharded_causal_attention`.

    Args:
      lengths: int [n], the tokens of each row's only sequence, or int [n, u], those of its sequences in order, 0 for
        none; at most t in total.
      segments: `segment_starts(lengths, t)`, int [n, t], which many layers can share; computed here by default.
      sinks: [h], a score of each head that takes part in every softmax and has no value, see
        `jdpo.models.attention.sinks`; "cudnn" has none.
      backend: "xla", "blockwise", "cudnn" or "splash"; `choose_attention` returns the fastest.
      window: number of tokens that a query sees, itself included; None for all earlier tokens.
      softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2 (arXiv 2408.00118).
      scale: factor of the scores; the default is k**-0.5.
      block_q, block_kv: queries and keys per tile, for blockwise (one size) and splash (multiples of 128).
      interpret: runs splash emulated, for tests.

    Raises:
      ValueError: the backend does not support the settings, or shapes are inconsistent.
    """
    _check_shapes(query_nthk, key_ntgk, value_ntgk, lengths, segments, sinks)
    length, head_dim = query_nthk.shape[1], query_nthk.shape[3]
    if lengths.size == len(lengths):
        # Causality alone separates the tokens of one sequence from the padding after them.
        lengths_n, segments = lengths.reshape(-1), None
    else:
        if backend == "cudnn":
            raise ValueError(f"attention backend 'cudnn' takes one sequence per row, found lengths {lengths.shape}")
        lengths_n = lengths.sum(1)
        segments = segment_starts(lengths, length) if segments is None else segments
    if window is not None and window >= length:
        window = None  # it hides nothing, and kernels with a window are slower
    scale = head_dim**-0.5 if scale is None else scale
    check_attention(
        backend,
        dtype=query_nthk.dtype,
        head_dim=head_dim,
        softcap=softcap,
        window=window,
        sinks=sinks is not None,
        block_q=block_q,
        block_kv=block_kv,
    )
    operands = (query_nthk, key_ntgk, value_ntgk)
    scoring: dict[str, Any] = {"sinks_h": sinks, "window": window, "softcap": softcap, "scale": scale}
    with jax.named_scope(f"attention_{backend}"):
        if backend == "cudnn":
            return cudnn_attention(*operands, lengths_n, window=window, scale=scale)
        if backend == "splash":
            return splash_attention(
                *operands, segments, **scoring, block_q=block_q, block_kv=block_kv, interpret=interpret
            )
        if backend == "blockwise":
            size = block_q or block_kv
            return blockwise_attention(*operands, lengths_n, segments, **scoring, block_size=size)
        return right_padded_attention(*operands, lengths_n, segments, **scoring)


def sharded_causal_attention(
    query_nthk: jax.Array,
    key_ntgk: jax.Array,
    value_ntgk: jax.Array,
    *,
    lengths: jax.Array,
    segments: jax.Array | None = None,
    sinks: jax.Array | None = None,
    mesh: Mesh | AbstractMesh,
    batch_axes: tuple[str, ...],
    head_axes: tuple[str, ...] = (),
    **options: Any,
) -> jax.Array:
    """Runs `causal_attention` with n split over batch_axes and heads over head_axes, without communication.

    Raises:
      ValueError: n, or the number of query or key heads, does not divide evenly.
    """
    parts = {axes: math.prod(mesh.shape[axis] for axis in axes) for axes in (batch_axes, head_axes)}
    counts = (("rows", query_nthk.shape[0], batch_axes), ("key heads", key_ntgk.shape[2], head_axes))
    for what, count, axes in counts:
        if count % parts[axes]:
            raise ValueError(f"{count} {what} do not divide over the {parts[axes]} devices of mesh axes {axes}")
    # [n, t, h, k]; positions stay whole, since a query may see any earlier key.
    heads = PartitionSpec(batch_axes, None, head_axes, None)
    # XLA cannot split custom kernels or the loops over tiles, so each device runs them on its own part.
    attention = jax.shard_map(
        lambda query, key, value, lengths, segments, sinks: causal_attention(
            query, key, value, lengths=lengths, segments=segments, sinks=sinks, **options
        ),
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(batch_axes), PartitionSpec(batch_axes), PartitionSpec(head_axes)),
        out_specs=heads,
        # Off, because loops over tiles start from zeros that are equal on all devices, which the check refuses.
        check_vma=False,
    )
    return attention(query_nthk, key_ntgk, value_ntgk, lengths, segments, sinks)


def _check_shapes(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None,
    sinks: jax.Array | None,
) -> None:
    n, t, h, k = query.shape
    g = key.shape[2]
    fits = key.shape == (n, t, g, k) and value.shape == key.shape and not h % g
    if not fits or lengths.ndim not in (1, 2) or len(lengths) != n or getattr(segments, "shape", (n, t)) != (n, t):
        raise ValueError(
            "expected query [n, t, h, k], key and value [n, t, g, k] with g a divisor of h, lengths [n] or [n, u], and "
            f"segments [n, t] or None; found {query.shape}, {key.shape}, {value.shape}, {lengths.shape} and "
            f"{getattr(segments, 'shape', None)}"
        )
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"expected sinks [h], one for each of {h} query heads; found {sinks.shape}")
