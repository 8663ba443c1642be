"""Attention over flat rows: pairs are back to back in a row's slots, and attention sees one sequence per branch.

Axes: r rows, s slots of a row, n branches of an item (2 of a pair), q attention sequences of a row, t positions of a
sequence, l = q t places, h heads, k head width.

    slots (s = 8)      P0 P1 C0 C1 R0 -  -  -       one pair: prompt, chosen, rejected
    gather (q, t)      0  1  2  3                   prompt + chosen
                       0  1  4  .                   prompt + rejected
    scatter (s)        0  1  2  3  6  0  0  0       each slot's place in the flattened (q, t): its output is read there
    readers (n, s)     0  1  2  3  .  .  .  .       the place that reads a slot in the first branch,
                       4  5  .  .  6  .  .  .       and in the second

Both directions, and both of their transposes, are gathers: no scatter-add, which is slow and unordered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

Array = Any


class PackedSequences(NamedTuple):
    """The indices by which attention gathers the tokens of its sequences, and slots gather their outputs.

    Attributes:
      slot: int32 [r, l], the slot that each place reads; arbitrary past a sequence's length.
      lengths: int32 [r, q], number of real places of each sequence, at least 1.
      place: int32 [r, s], the place that each slot's output is read from; 0 on unused slots.
      readers: int32 [r, n, s], the place that reads a slot in each branch; l if none does.
      is_read: bool [r, l], True if a slot reads its output from this place.
    """

    slot: Array
    lengths: Array
    place: Array
    readers: Array
    is_read: Array


def packed_sequences(gather: Array, lengths: Array, scatter: Array, readers: Array) -> PackedSequences:
    """Prepares the layout of a packed batch for the layers.

    Args:
      gather: int [r, q, t].
      lengths: int [r, q].
      scatter: int [r, s].
      readers: int [r, n, s].
    """
    slot = rearrange(gather, "r q t -> r (q t)")
    # A prompt has a place in every branch, but its slot reads only one of them.
    is_read = _take(scatter, slot) == jnp.arange(slot.shape[-1])
    return PackedSequences(slot, lengths, scatter, readers, is_read)


def num_readers(layout: PackedSequences) -> Array:
    """Returns int [r, s], the number of sequences of each slot: 2 in the prompt of a pair, 0 in unused slots."""
    # l, one past the last place, means that no place reads the slot.
    return (layout.readers < layout.slot.shape[-1]).sum(1)


def to_sequences(x_rshk: Array, layout: PackedSequences) -> Array:
    """Gathers slots to sequences: [r, s, h, k] -> [(r q), t, h, k]; values past a sequence's length are arbitrary."""
    return rearrange(_to_places(x_rshk, layout), "r (q t) h k -> (r q) t h k", q=layout.lengths.shape[-1])


def to_slots(x_nthk: Array, layout: PackedSequences) -> Array:
    """Gathers sequences to slots: [(r q), t, h, k] -> [r, s, h, k]; values in unused slots are arbitrary."""
    return _to_slots(rearrange(x_nthk, "(r q) t h k -> r (q t) h k", q=layout.lengths.shape[-1]), layout)


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
