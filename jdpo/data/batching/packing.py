"""Packed batches: items back to back in rows of slots, each prompt once, with indices for attention and the head.

    pair: prompt 5 6, chosen 7 2, rejected 8            s 8, q 1, u 2, t 8, c 4; the row holds this pair alone
    tokens       5 6 7 2 8 0 0 0
    positions    0 1 2 3 2 0 0 0
    gather       0 1 2 3 0 1 4 7                        attention sees 5 6 7 2 and 5 6 8 in one row, then padding
    lengths      4 3
    scatter      0 1 2 3 6 0 0 0                        where each slot's attention output is
    logp_slot    1 2 1 0                                6 predicts 7, 7 predicts 2, 6 predicts 8
    logp_target  7 2 8 0
    logp_pair    0 0 1 2                                chosen, chosen, rejected, none

A supervised row is an item with one side and no prompt: `tokens` once, scored where its mask is True. A completion
token at position 0 is not scored, because no token before it predicts it; `jdpo.losses.pair_logps.predicted_tokens`
does the same for padded batches. Axes: see `jdpo.data.batching.packing_shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdpo.data.batching.attention_rows import join_sequences
from jdpo.data.batching.packing_plan import StepPlan
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.types import AnyPair, MaskedPair, PackedBatch, TokenizedCompletion

Array = Any


def pack_step(
    rows: Sequence[AnyPair] | Sequence[TokenizedCompletion],
    indices: np.ndarray,
    plan: StepPlan,
    *,
    reference_logps: Sequence[tuple[np.ndarray, ...]] | None = None,
    score_margins: np.ndarray | None = None,
) -> PackedBatch:
    """Packs the items of a step.

    Args:
      rows: the b items, all of one kind.
      indices: int [b], their row numbers in the data.
      plan: the bin of each item, and the shape of the batch; see `PackingPlan.step`.
      reference_logps: for each item, the log-probs of the completion tokens of each side, from a `ReferenceCache`.
      score_margins: float [b], for losses that read scores.

    Returns:
      Numpy arrays. The items of a row keep their order.
    """
    bins, shape = plan
    assert len(rows) == len(indices) == len(bins.bin_of) > 0, (len(rows), len(indices), len(bins.bin_of))
    assert bins.num_micro <= shape.num_micro, (bins.num_micro, shape)
    # Items of one bin must be next to each other; stable keeps their order within a bin.
    order = np.argsort(bins.bin_of, kind="stable")
    layout = _layout([rows[i] for i in order], bins.bin_of[order], shape)
    reference = None if reference_logps is None else [reference_logps[i] for i in order]

    def of_items(dtype: Any, values: Any, padding: int = 0) -> np.ndarray:
        return _filled(shape, (shape.num_items,), dtype, (layout.bin_b, layout.local_b), values, padding)

    return PackedBatch(
        **_slot_arrays(layout, shape),
        **_attention_arrays(layout, shape),
        **_scored_arrays(layout, shape, reference),
        pair_weight=of_items(np.float32, 1),
        pair_row=of_items(np.int32, indices[order]),
        pair_score_margin=None if score_margins is None else of_items(np.float32, score_margins[order], padding=1),
    )


def unused(
    shape: PackedShape, *, num_sides: int, reference_dtype: Any = None, with_scores: bool = False
) -> PackedBatch:
    """Returns a batch of zeros with the shapes and dtypes that `pack_step` gives for a shape. It takes no memory.

    Args:
      num_sides: n.
      reference_dtype: dtype of cached log-probs; None: the batch has none.
      with_scores: True if score margins travel with the batch.
    """
    axes: dict[str, tuple[int, ...]] = {
        "tokens": (shape.num_slots,),
        "positions": (shape.num_slots,),
        "gather": (shape.num_attention_rows, shape.length),
        "lengths": (shape.num_attention_rows, shape.sequences_per_row),
        "scatter": (shape.num_slots,),
        "readers": (num_sides, shape.num_slots),
        "logp_slot": (shape.num_scored,),
        "logp_target": (shape.num_scored,),
        "logp_pair": (shape.num_scored,),
        "pair_weight": (shape.num_items,),
        "pair_row": (shape.num_items,),
    }
    dtypes: dict[str, Any] = dict.fromkeys(axes, np.int32) | {"pair_weight": np.float32}
    if reference_dtype is not None:
        axes["logp_reference"], dtypes["logp_reference"] = (shape.num_scored,), reference_dtype
    if with_scores:
        axes["pair_score_margin"], dtypes["pair_score_margin"] = (shape.num_items,), np.float32
    leading = (shape.num_micro, shape.num_rows)
    return PackedBatch(
        **{name: np.broadcast_to(np.zeros((), dtypes[name]), leading + own) for name, own in axes.items()}
    )


class _Layout(NamedTuple):
    """The position of every item and token of a step.

    Axes: b items in the order of their bins, n sides, x used slots of all items one after the other.
    Bins are numbered over (k m), slots within their bin.
    """

    bin_b: np.ndarray
    local_b: np.ndarray  # the item's number within its bin
    prompt_start_b: np.ndarray  # first slot of each part of an item, and the number of its tokens
    prompt_length_b: np.ndarray
    side_start_bn: np.ndarray
    side_length_bn: np.ndarray
    row_bn: np.ndarray  # attention row of each side's sequence, its number there, and its first place among (q t)
    number_bn: np.ndarray
    place_bn: np.ndarray
    token_x: np.ndarray
    bin_x: np.ndarray
    slot_x: np.ndarray
    item_x: np.ndarray
    side_x: np.ndarray  # -1 in prompts
    within_x: np.ndarray  # the token's number within its prompt or side
    scored_x: np.ndarray  # bool


def _layout(rows: Sequence[Any], bin_b: np.ndarray, shape: PackedShape) -> _Layout:
    masks: list[np.ndarray] | None = None
    if isinstance(rows[0], TokenizedCompletion):
        # An empty prompt in front gives supervised rows the layout of pairs.
        parts = [part for row in rows for part in (row.tokens[:0], row.tokens)]
        masks = [row.completion_mask for row in rows]
    else:
        parts = [part for row in rows for part in (row.prompt_ids, row.chosen_ids, row.rejected_ids)]
        if isinstance(rows[0], MaskedPair):
            masks = [
                mask
                for row in rows
                for mask in (np.zeros(len(row.prompt_ids), bool), row.chosen_mask, row.rejected_mask)
            ]
    part_lengths = np.array([len(part) for part in parts], np.int64).reshape(len(rows), -1)
    num_parts = part_lengths.shape[1]
    first_of_bin = np.searchsorted(bin_b, bin_b)  # the first item of each item's bin
    ends = part_lengths.sum(1).cumsum()
    bin_start_b = (ends - part_lengths.sum(1))[first_of_bin]
    part_end = part_lengths.reshape(-1).cumsum()
    start_in_bin = (part_end - part_lengths.reshape(-1)).reshape(part_lengths.shape) - bin_start_b[:, None]
    row_bn, start_bn, number_bn = _joined(part_lengths[:, :1] + part_lengths[:, 1:], bin_b, shape)

    part_x = np.repeat(np.arange(len(parts)), part_lengths.reshape(-1))
    item_x, side_x = part_x // num_parts, part_x % num_parts - 1
    # Everything below is vectorized over all slots; a Python loop over tokens would be slow.
    everywhere = np.arange(len(part_x))
    within_x = everywhere - (part_end - part_lengths.reshape(-1))[part_x]
    scored_x = np.concatenate(masks) if masks is not None else side_x >= 0
    return _Layout(
        bin_b=bin_b,
        local_b=np.arange(len(rows)) - first_of_bin,
        prompt_start_b=start_in_bin[:, 0],
        prompt_length_b=part_lengths[:, 0],
        side_start_bn=start_in_bin[:, 1:],
        side_length_bn=part_lengths[:, 1:],
        row_bn=row_bn,
        number_bn=number_bn,
        place_bn=row_bn * shape.length + start_bn,
        token_x=np.concatenate(parts),
        bin_x=bin_b[item_x],
        slot_x=everywhere - bin_start_b[item_x],
        item_x=item_x,
        side_x=side_x,
        within_x=within_x,
        # The first token of a side is predicted by the last of its prompt, so it needs a prompt.
        scored_x=scored_x & ((within_x > 0) | (part_lengths[item_x, 0] > 0)),
    )


def _joined(sequence_bn: np.ndarray, bin_b: np.ndarray, shape: PackedShape) -> list[np.ndarray]:
    """Joins the sequences of each bin into attention rows, as `needed_sizes` does: row, start, number [b, n] each."""
    ends = np.flatnonzero(np.diff(bin_b)) + 1
    joined = [
        join_sequences(of_bin.reshape(-1), shape.length, shape.sequences_per_row)
        for of_bin in np.split(sequence_bn, ends)
    ]
    return [np.concatenate(field).reshape(sequence_bn.shape) for field in zip(*joined, strict=True)]


def _filled(
    shape: PackedShape, axes: tuple[int, ...], dtype: Any, at: tuple[Any, ...], values: Any, rest: int = 0
) -> np.ndarray:
    """Returns an array [k, m, *axes] with `values` at the indices `at` [(k m), *axes] and `rest` elsewhere."""
    array = np.full((shape.num_micro * shape.num_rows, *axes), rest, dtype)
    array[at] = values
    return array.reshape(shape.num_micro, shape.num_rows, *axes)


def _slot_arrays(layout: _Layout, shape: PackedShape) -> dict[str, np.ndarray]:
    """Returns the arrays with an axis of slots except `readers`: tokens, positions, scatter."""
    position_x, side_x = _positions(layout), np.maximum(layout.side_x, 0)
    # Prompts read their outputs in the first side.
    place_x = layout.place_bn[layout.item_x, side_x] + position_x
    at, slots = (layout.bin_x, layout.slot_x), (shape.num_slots,)
    return {
        "tokens": _filled(shape, slots, np.int32, at, layout.token_x),
        "positions": _filled(shape, slots, np.int32, at, position_x),
        "scatter": _filled(shape, slots, np.int32, at, place_x),
    }


def _positions(layout: _Layout) -> np.ndarray:
    # Both sides continue at the position after their prompt.
    positions: np.ndarray = layout.within_x + np.where(layout.side_x < 0, 0, layout.prompt_length_b[layout.item_x])
    return positions


def _attention_arrays(layout: _Layout, shape: PackedShape) -> dict[str, np.ndarray]:
    """Returns the arrays by which attention reads slots: gather, lengths, readers."""
    num_bins, num_sides = shape.num_micro * shape.num_rows, layout.side_length_bn.shape[1]
    num_places = shape.num_attention_rows * shape.length
    gather = np.empty((num_bins, num_places), np.int32)
    # Places without a token read slots in turn: many reads of one slot would be slow.
    gather[:] = np.arange(num_places) % shape.length % shape.num_slots
    # Out of range: no place reads the slot.
    readers = np.full((num_bins, num_sides, shape.num_slots), num_places, np.int32)
    position_x = _positions(layout)
    for side in range(num_sides):
        # A slot of the prompt is read by all sides of its item, a slot of a side by that side alone.
        reads_x = (layout.side_x < 0) | (layout.side_x == side)
        bins, slots = layout.bin_x[reads_x], layout.slot_x[reads_x]
        places = layout.place_bn[layout.item_x[reads_x], side] + position_x[reads_x]
        gather[bins, places], readers[bins, side, slots] = slots, places
    bin_bn = np.broadcast_to(layout.bin_b[:, None], layout.row_bn.shape)
    axes = (shape.num_attention_rows, shape.sequences_per_row)
    lengths = _filled(
        shape,
        axes,
        np.int32,
        (bin_bn, layout.row_bn, layout.number_bn),
        layout.prompt_length_b[:, None] + layout.side_length_bn,
    )
    if shape.sequences_per_row == 1:
        # cuDNN returns NaN for a sequence of no keys.
        lengths = np.maximum(lengths, 1)
    leading = (shape.num_micro, shape.num_rows)
    return {
        "gather": gather.reshape(*leading, shape.num_attention_rows, shape.length),
        "lengths": lengths,
        "readers": readers.reshape(*leading, num_sides, shape.num_slots),
    }


def _scored_arrays(
    layout: _Layout, shape: PackedShape, reference: Sequence[tuple[np.ndarray, ...]] | None
) -> dict[str, np.ndarray]:
    """Returns the arrays with an axis of scored tokens: logp_slot, logp_target, logp_pair, logp_reference."""
    num_sides = layout.side_length_bn.shape[1]
    x = np.flatnonzero(layout.scored_x)
    item, side = layout.item_x[x], layout.side_x[x]
    last_of_prompt = layout.prompt_start_b[item] + layout.prompt_length_b[item] - 1
    # The hidden state before a token predicts it; before the first token of a side that is the end of the prompt.
    predicted_from = np.where(layout.within_x[x] > 0, layout.slot_x[x] - 1, last_of_prompt)
    bins = layout.bin_x[x]
    # Number of the scored token within its bin.
    at = (bins, np.arange(len(x)) - np.searchsorted(bins, bins))
    axes = (shape.num_scored,)
    arrays = {
        "logp_slot": _filled(shape, axes, np.int32, at, predicted_from),
        "logp_target": _filled(shape, axes, np.int32, at, layout.token_x[x]),
        "logp_pair": _filled(
            shape, axes, np.int32, at, num_sides * layout.local_b[item] + side, rest=num_sides * shape.num_items
        ),
    }
    if reference is not None:
        lengths = np.array([[len(values) for values in sides] for sides in reference])
        assert np.array_equal(lengths, layout.side_length_bn), (lengths, layout.side_length_bn)
        values = np.concatenate([values for sides in reference for values in sides])
        # The cache has a value for every token of a side, also for those that are not scored: place all, then select.
        of_x = np.zeros(len(layout.token_x), values.dtype)
        of_x[layout.side_x >= 0] = values
        arrays["logp_reference"] = _filled(shape, axes, values.dtype, at, of_x[x])
    return arrays
