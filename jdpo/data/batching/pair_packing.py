"""Packs tokenized pairs for training loops outside jdpo, and reads values of packed tokens back.

A loop of jdpo's own plans all steps of a run before it packs one (`jdpo.data.batching.packing_plan`). Here the caller
knows the rows of one step only, and fixes the sizes that must not change from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import ItemSizes, StepBins, StepPlan, item_sizes, needed_sizes, plan_step
from jdpo.data.batching.packing_shapes import LENGTH_MULTIPLE, StepNeeds, own_shape
from jdpo.data.batching.pair_reading import read_margins, read_pairs, read_reference
from jdpo.types import CHOSEN, AnyArray, PackedBatch


def pack(
    rows: Sequence[Mapping[str, Any]],
    *,
    num_rows: int = 1,
    num_micro: int | None = None,
    num_slots: int | None = None,
    num_pairs: int | None = None,
    length: int | None = None,
    num_scored: int | None = None,
    sequences_per_row: int = 1,
    num_attention_rows: int | None = None,
    reference_logps: Sequence[Sequence[Any]] | None = None,
    score_margins: Any = None,
) -> PackedBatch:
    """Packs tokenized pairs back to back into rows of slots, each prompt once.

    A size that is not given is what these rows need, with num_slots, length and num_scored rounded up to a multiple of
    64. Give all sizes, and every batch has the same shapes, so that a jitted step is compiled once.

    Args:
      rows: the b pairs of a step. Each has the token ids prompt_ids, chosen_ids and rejected_ids, integers [tokens];
        optionally also chosen_mask and rejected_mask, bool [tokens], True on the completion tokens to learn. A prompt
        may be empty; then the first token of a completion is not scored. Other keys are not read.
      num_rows: m, the number of rows of slots, which pairs are distributed over evenly. For data-parallel training,
        the number of devices or a multiple of it.
      num_micro: k, the number of micro-batches for gradient accumulation. None: one, and the arrays have no axis k.
      num_slots: s, the number of slots of each row. A pair takes prompt + chosen + rejected tokens.
      num_pairs: p, the number of pairs that a row can hold.
      length: t, the number of places of an attention row, which holds prompt + completion.
      num_scored: c, the number of completion tokens that a row can hold; num_slots is always enough.
      sequences_per_row: u, the maximum number of sequences of an attention row. With more than 1, attention has far
        less padding, and it must mask keys by segment; see `packed_attention`.
      num_attention_rows: q, the number of attention rows of each row of slots; with sequences_per_row 1 it is 2 p.
      reference_logps: for each row, the reference's log-probs of its chosen and of its rejected tokens, float [tokens]
        each, as `unpack_logps` returns them. Values of tokens that are not scored are not read.
      score_margins: float [b], by how much each chosen answer was scored higher, for losses that read scores.

    Returns:
      Numpy arrays [m, ...], or [k, m, ...] with num_micro. `pair_row` is the index of a pair in `rows`.

    Raises:
      ValueError: a row that cannot be packed, a size that is too small, or log-probs or scores of other shapes. The
        message names the row or the size.

    >>> batch = pack([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}], num_slots=8, length=4)
    >>> batch.tokens.tolist(), batch.positions.tolist()
    ([[5, 6, 7, 2, 8, 0, 0, 0]], [[0, 1, 2, 3, 2, 0, 0, 0]])
    """
    given = {"num_rows": num_rows, "num_micro": num_micro, "num_slots": num_slots, "num_pairs": num_pairs}
    given |= {"length": length, "num_scored": num_scored, "sequences_per_row": sequences_per_row}
    _check_sizes(given | {"num_attention_rows": num_attention_rows})
    pairs = read_pairs(rows)
    sizes = item_sizes(pairs)
    _check_longest(sizes, num_slots, length)
    num_bins = num_rows * (num_micro or 1)
    plan = plan_step(sizes.slots, num_rows=num_bins, max_slots=num_slots, max_items=num_pairs)
    if plan.num_micro > 1:
        needed = plan_step(sizes.slots, num_rows=num_rows, max_slots=num_slots, max_items=num_pairs).num_micro
        raise ValueError(
            f"{len(pairs)} pairs of {sizes.slots.sum():,} tokens do not fit into {num_bins} rows of slots (num_slots "
            f"{num_slots}, num_pairs {num_pairs}). Pass num_micro={needed}, more num_rows, or larger rows"
        )
    lengths = np.array([length or -(-int(sizes.longest.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE])
    # The bins are numbered micro-batch * m + row, so one step of k * m rows is k micro-batches of m.
    need = needed_sizes(sizes, plan, num_bins, lengths, sequences_per_row)
    if num_scored is not None and num_scored < need.num_scored:
        raise ValueError(f"num_scored must be at least {need.num_scored} for these rows, found {num_scored}")
    automatic = own_shape(need, lengths)
    num_pairs = num_pairs or automatic.num_items
    shape = automatic._replace(
        num_micro=num_micro or 1,
        num_rows=num_rows,
        num_items=num_pairs,
        num_slots=num_slots or automatic.num_slots,
        num_attention_rows=_attention_rows(num_attention_rows, sequences_per_row, num_pairs, need),
        sequences_per_row=sequences_per_row,
        num_scored=num_scored or automatic.num_scored,
    )
    batch = pack_step(
        pairs,
        np.arange(len(pairs)),
        StepPlan(StepBins(shape.num_micro, plan.bin_of), shape),
        reference_logps=None if reference_logps is None else read_reference(reference_logps, pairs),
        score_margins=None if score_margins is None else read_margins(score_margins, len(pairs)),
    )
    if num_micro is not None:
        return batch
    return PackedBatch._make(None if array is None else array[0] for array in batch)


def unpack_logps(batch: PackedBatch, logps: AnyArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the values of packed completion tokens by row, in the form that `pack` takes as reference_logps.

    With it, the log-probs of a frozen reference are computed once and packed with any later batch of the same rows.

    Args:
      batch: a batch of `pack`, with or without an axis of micro-batches.
      logps: float [..., c], one value for each scored token, as `jdpo.losses.packed_token_logps` returns.

    Returns:
      For each row, in the order given to `pack`, the values of its chosen and of its rejected tokens, [tokens] each;
      0 for tokens that are not scored.

    Raises:
      ValueError: logps has another shape than batch.logp_slot.

    >>> batch = pack([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}])
    >>> values = -np.arange(1.0, 1 + batch.logp_slot.shape[-1])
    >>> [side.tolist() for side in unpack_logps(batch, values[None])[0]]
    [[-1.0, -2.0], [-3.0]]
    """
    values = np.asarray(logps)
    if values.shape != batch.logp_slot.shape:
        raise ValueError(
            f"expected one value per scored token, {batch.logp_slot.shape} as batch.logp_slot, found {values.shape}"
        )
    # Micro-batches and rows as one axis; all indices count within a row.
    leading = batch.tokens.ndim - 1
    host = PackedBatch._make(
        None if array is None else np.asarray(array).reshape(-1, *array.shape[leading:]) for array in batch
    )
    values = values.reshape(-1, values.shape[-1])
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for row, pair in np.argwhere(host.pair_weight > 0).tolist():
        chosen, rejected = (_side_values(host, values, row, pair, side) for side in range(2))
        found[int(host.pair_row[row, pair])] = chosen, rejected
    return [found[index] for index in sorted(found)]


def _side_values(batch: PackedBatch, values: np.ndarray, row: int, pair: int, side: int) -> np.ndarray:
    """Returns the values of one completion of a pair, in a batch whose only leading axis is that of rows."""
    reads = batch.readers[row] < batch.gather[row].size
    # Pairs are back to back, and the chosen side reads the first slot of each.
    of_pair = np.cumsum((batch.positions[row] == 0) & reads[CHOSEN]) - 1 == pair
    # Both sides read the prompt, and one side alone reads a completion.
    prompt_length = int((of_pair & reads.all(0)).sum())
    scored = batch.logp_pair[row] == len(reads) * pair + side
    result = np.zeros(int((of_pair & reads[side]).sum()) - prompt_length, values.dtype)
    # A slot predicts the token at the next position; positions count from the start of the prompt.
    result[batch.positions[row, batch.logp_slot[row, scored]] + 1 - prompt_length] = values[row, scored]
    return result


def _attention_rows(given: int | None, sequences_per_row: int, num_pairs: int, need: StepNeeds) -> int:
    """Returns q, the attention rows of each row of slots."""
    if sequences_per_row == 1:
        # One for each side of each pair, also of padding.
        needed = most = 2 * num_pairs
    else:
        needed, most = int(need.attention_rows[0]), None
    if given is not None and (given < needed or most not in (None, given)):
        raise ValueError(f"num_attention_rows must be {'at least ' if most is None else ''}{needed}, found {given}")
    return given or needed


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        is_number = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if size is not None and not (is_number and size >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1, found {size!r}")


def _check_longest(sizes: ItemSizes, num_slots: int | None, length: int | None) -> None:
    """Checks that every pair fits into a row of slots and into attention sequences; a pair is never cut."""
    limits = (
        ("num_slots", num_slots, sizes.slots, "prompt, chosen and rejected together"),
        ("length", length, sizes.longest, "prompt and longer completion"),
    )
    for name, limit, needed, what in limits:
        if limit is not None and needed.max() > limit:
            row = int(np.argmax(needed > limit))
            raise ValueError(
                f"rows[{row}] has {needed[row]} tokens ({what}), more than {name}={limit}. Cut or drop the row, or "
                f"pass {name}={needed.max()}"
            )
