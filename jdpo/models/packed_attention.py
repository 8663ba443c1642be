"""Attention over flat rows: pairs are back to back in a row's slots, and attention sees one sequence per branch.

Axes: r rows, s slots of a row, n branches of an item (2 of a pair), q attention rows of a row of slots, u sequences of
an attention row, t places of an attention row, l = q t places, h heads, k head width.

    slots (s = 8)      P0 P1 C0 C1 R0 -  -  -       one pair: prompt, chosen, rejected
    gather (q, t)      0  1  2  3  0  1  4  .       one attention row: prompt + chosen, prompt + rejected, padding
    lengths (q, u)     4  3                         the tokens of its two sequences
    scatter (s)        0  1  2  3  6  0  0  0       each slot's place in the flattened (q, t): its output is read there
    readers (n, s)     0  1  2  3  .  .  .  .       the place that reads a slot in the first branch,
                       4  5  .  .  6  .  .  .       and in the second

Both directions, and both of their transposes, are gathers: no scatter-add, which is slow and unordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jdpo.models.attention.segments import segment_starts
from jdpo.types import PackedBatch

Array = Any


def packed_attention(
    attend: Callable[[Array, Array, Array, Array], Array], batch: PackedBatch
) -> Callable[[Array, Array, Array], Array]:
    """Makes causal attention over packed rows out of any causal attention over padded sequences.

    A model of your own reads a packed batch with two changes: its positions are `batch.positions`, and its attention is
    the function returned here. Everything else (embeddings, norms, projections, the MLP) works on slots as on tokens.
    Sequences and slots are gathered from each other in both directions, forward and backward.

    Args:
      attend: (query [n, t, h, d], key [n, t, g, d], value [n, t, g, e], segment_ids int [n, t]) -> [n, t, h, e]. It is
        causal, and it masks keys whose segment differs from the query's: sequences are numbered from 1 in each of the n
        rows, and 0 is the padding after them. With one sequence per row, which is what `jdpo.pack` makes unless it is
        told otherwise, attention that is causal only gives the same results, since no token sees the padding after it.
        Scale, softcap and window are its own, and so is the number of key heads g.
      batch: arrays [m, ...] of a micro-batch, or of one row without the axis m, as within `jax.vmap` over rows.

    Returns:
      (query [m, s, h, d], key [m, s, g, d], value [m, s, g, e]) -> [m, s, h, e], the attention of every slot to the
      slots of its own sequence; without m for one row. Values in unused slots are arbitrary.

    Raises:
      ValueError: attend is no function, batch is not packed or has an axis of micro-batches, or an array does not have
        the shape above.
    """
    if not callable(attend):
        raise ValueError(
            f"packed_attention: expected a function attend(query, key, value, segment_ids), found {_kind(attend)}"
        )
    if not isinstance(batch, PackedBatch):
        raise ValueError(f"packed_attention: expected a batch of jdpo.pack, found {_kind(batch)}")
    is_row = batch.tokens.ndim == 1
    if batch.tokens.ndim not in (1, 2):
        raise ValueError(
            f"expected a batch of rows [m, s], or one row [s]; found tokens {batch.tokens.shape}. Run micro-batches "
            "[k, m, s] one after the other, as jax.lax.scan does"
        )
    arrays = (jnp.asarray(array) for array in (batch.gather, batch.lengths, batch.scatter, batch.readers))
    layout = packed_sequences(*(array[None] if is_row else array for array in arrays))
    segment_ids = segment_numbers(rearrange(layout.lengths, "r q u -> (r q) u"), batch.gather.shape[-1])

    def attend_sequences(query: Array, key: Array, value: Array) -> Array:
        output, expected = attend(query, key, value, segment_ids), (*query.shape[:3], value.shape[3])
        if getattr(output, "shape", None) != expected:
            raise ValueError(
                f"packed_attention: attend must return {expected} for a query {query.shape}, found "
                f"{getattr(output, 'shape', type(output).__name__)}"
            )
        return output

    def attention(query: Array, key: Array, value: Array) -> Array:
        for name, array in (("query", query), ("key", key), ("value", value)):
            if array.ndim != batch.tokens.ndim + 2 or array.shape[:-2] != batch.tokens.shape:
                raise ValueError(
                    f"packed_attention: expected a {name} [m, s, heads, head width] for batch.tokens "
                    f"{batch.tokens.shape}, both without m for one row; found {array.shape}"
                )
        slots = [array[None] if is_row else array for array in (query, key, value)]
        output = attend_packed(attend_sequences, layout, *slots)
        return output[0] if is_row else output

    return attention


def segment_numbers(lengths: Array, num_places: int) -> Array:
    """Returns int32 [n, t], the number from 1 of the sequence at each place of an attention row, and 0 for padding.

    Args:
      lengths: int [n, u], tokens of the sequences of each row.
      num_places: t.

    >>> segment_numbers(jnp.array([[2, 1, 0]]), 5).tolist()
    [[1, 1, 2, 0, 0]]
    """
    ends = jnp.cumsum(lengths, axis=1)[:, None]  # [n, 1, u]
    places = jnp.arange(num_places)
    number = 1 + (places[:, None] >= ends).sum(-1, dtype=jnp.int32)
    return jnp.where(places < ends[..., -1], number, 0)


def _kind(found: object) -> str:
    # As a value, a batch of arrays would fill the terminal.
    return f"an object of type {type(found).__name__}"


def attend_packed(
    attend: Callable[[Array, Array, Array], Array], layout: PackedSequences, query: Array, key: Array, value: Array
) -> Array:
    """Runs attention over rows of sequences on flat slots; a prompt is copied to each of its branches.

    Args:
      attend: (query, key, value), [(r q), t, heads, head width] each -> [(r q), t, h, k].
      query, key, value: [r, s, heads, head width] each; heads and widths may differ.

    Returns:
      [r, s, h, k].
    """
    return to_slots(attend(*(to_sequences(x, layout) for x in (query, key, value))), layout)


class PackedSequences(NamedTuple):
    """The indices by which attention gathers the tokens of its sequences, and slots gather their outputs.

    Attributes:
      slot: int32 [r, l], the slot that each place reads; arbitrary after the last sequence of an attention row.
      lengths: int32 [r, q, u], tokens of the sequences of each attention row, in order; 0 for none.
      place: int32 [r, s], the place that each slot's output is read from; 0 on unused slots.
      readers: int32 [r, n, s], the place that reads a slot in each branch; l if none does.
      is_read: bool [r, l], True if a slot reads its output from this place.
      segments: int32 [(r q), t], the place where the sequence of each place starts; None where u is 1.
    """

    slot: Array
    lengths: Array
    place: Array
    readers: Array
    is_read: Array
    segments: Array | None


def packed_sequences(gather: Array, lengths: Array, scatter: Array, readers: Array) -> PackedSequences:
    """Prepares the layout of a packed batch for the layers.

    Args:
      gather: int [r, q, t].
      lengths: int [r, q, u].
      scatter: int [r, s].
      readers: int [r, n, s].
    """
    slot = rearrange(gather, "r q t -> r (q t)")
    # A prompt has a place in every branch, but its slot reads only one of them.
    is_read = _take(scatter, slot) == jnp.arange(slot.shape[-1])
    segments = None
    if lengths.shape[-1] > 1:
        # Once per step, not in every layer.
        segments = segment_starts(rearrange(jnp.asarray(lengths), "r q u -> (r q) u"), gather.shape[-1])
    return PackedSequences(slot, lengths, scatter, readers, is_read, segments)


def num_readers(layout: PackedSequences) -> Array:
    """Returns int [r, s], the number of sequences of each slot: 2 in the prompt of a pair, 0 in unused slots."""
    # l, one past the last place, means that no place reads the slot.
    return (layout.readers < layout.slot.shape[-1]).sum(1)


def to_sequences(x_rshk: Array, layout: PackedSequences) -> Array:
    """Gathers slots to attention rows: [r, s, h, k] -> [(r q), t, h, k]; values of padding are arbitrary."""
    return rearrange(_to_places(x_rshk, layout), "r (q t) h k -> (r q) t h k", q=layout.lengths.shape[1])


def to_slots(x_nthk: Array, layout: PackedSequences) -> Array:
    """Gathers attention rows to slots: [(r q), t, h, k] -> [r, s, h, k]; values in unused slots are arbitrary."""
    return _to_slots(rearrange(x_nthk, "(r q) t h k -> r (q t) h k", q=layout.lengths.shape[1]), layout)


def _take(values: Array, index: Array) -> Array:
    """Gathers values [r, a, ...] at index [r, b], all within a: [r, b, ...]."""
    # The host made the indices, so checking them on the device would be wasted work.
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(values, index)


@jax.custom_vjp
def _to_places(x_rshk: Array, layout: PackedSequences) -> Array:
    return _take(x_rshk, layout.slot)


def _to_places_forward(x_rshk: Array, layout: PackedSequences) -> tuple[Array, PackedSequences]:
    return _to_places(x_rshk, layout), layout


def _to_places_backward(layout: PackedSequences, g_rlhk: Array) -> tuple[Array, None]:
    # The gradient of a slot is the sum over its readers. JAX's own transpose of a gather is a scatter-add.
    none = g_rlhk.shape[1]
    total = None
    for branch in range(layout.readers.shape[1]):
        reader = layout.readers[:, branch]
        # [r, s, h, k]; clamped because "none" is out of bounds.
        read = _take(g_rlhk, jnp.minimum(reader, none - 1))
        # Selected, not multiplied by 0, which would keep a NaN.
        kept = jnp.where((reader < none)[..., None, None], read, 0)
        total = kept if total is None else total + kept
    return total, None


@jax.custom_vjp
def _to_slots(x_rlhk: Array, layout: PackedSequences) -> Array:
    return _take(x_rlhk, layout.place)


def _to_slots_forward(x_rlhk: Array, layout: PackedSequences) -> tuple[Array, PackedSequences]:
    return _to_slots(x_rlhk, layout), layout


def _to_slots_backward(layout: PackedSequences, g_rshk: Array) -> tuple[Array, None]:
    # At most one slot reads a place, so its gradient is that slot's, without a sum.
    return jnp.where(layout.is_read[..., None, None], _take(g_rshk, layout.slot), 0), None


_to_places.defvjp(_to_places_forward, _to_places_backward)
_to_slots.defvjp(_to_slots_forward, _to_slots_backward)
