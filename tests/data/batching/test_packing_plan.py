from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.data.batching.attention_rows import join_sequences
from jdpo.data.batching.loader import num_steps_per_epoch, plan
from jdpo.data.batching.packing_plan import (
    ItemSizes,
    PackingPlan,
    StepBins,
    completion_sizes,
    item_sizes,
    needed_sizes,
    pair_sizes,
    plan_run,
    plan_step,
)
from jdpo.data.batching.packing_shapes import (
    IMPOSSIBLE,
    MAX_SHAPES,
    SCORED_MULTIPLE,
    SLOT_MULTIPLE,
    PackedShape,
    StepNeeds,
    cheapest_shape,
    choose_shapes,
    own_shape,
    row_lengths,
)
from jdpo.types import MaskedPair, TokenizedCompletion, TokenizedPair

# --- sizes


def test_sizes_of_rows() -> None:
    def tokens(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    pairs = [TokenizedPair(tokens(3), tokens(2), tokens(4), ""), TokenizedPair(tokens(0), tokens(2), tokens(1), "")]
    sizes = item_sizes(pairs)
    assert [array.tolist() for array in sizes] == [[9, 3], [[5, 7], [2, 1]], [6, 1]]
    assert (sizes.num_sides, sizes.longest.tolist()) == (2, [7, 2])
    rows = [TokenizedCompletion(tokens(4), np.array([True, False, True, True]), "")]
    assert item_sizes(rows) == completion_sizes(np.array([4]), np.array([2]))


def test_tokens_that_are_not_learnt_need_no_place_for_a_log_prob() -> None:
    mask = np.array([True, False, False, True])
    ids = np.zeros(4, np.int32)
    sizes = item_sizes([MaskedPair(ids[:3], ids, ids[:2], mask, mask[:2], "")])
    assert [array.tolist() for array in sizes] == [[9], [[7, 5]], [3]]


LENGTHS = np.array([8, 16])


def test_the_sizes_of_a_step_hold_its_fullest_row_and_its_longest_sequence() -> None:
    # Rows 0 and 2 of two micro-batches of two rows: items of 9, 4 and 6 slots, the first alone.
    sizes = ItemSizes(np.array([9, 4, 6]), np.array([[9, 3], [3, 2], [5, 5]]), np.array([1, 2, 5]))
    bins = StepBins(2, np.array([0, 2, 2]))
    need = needed_sizes(sizes, bins, 2, LENGTHS, None)
    assert need[:5] == (2, 2, 2, 10, 7)
    # Rows of 8 places are too short; of 16 places, the second bin's 5, 5, 3 and 2 fit into one row.
    assert need.attention_rows.tolist() == [IMPOSSIBLE, 1]
    assert need.per_row.tolist()[1] == 4
    assert needed_sizes(sizes, bins, 2, LENGTHS, 1).attention_rows.tolist() == [IMPOSSIBLE, 4]
    assert needed_sizes(sizes, bins, 2, LENGTHS, 2).attention_rows.tolist() == [IMPOSSIBLE, 2]
    assert own_shape(need, LENGTHS) == PackedShape(2, 2, 2, 64, 1, 4, 16, 64)
    nothing_scored = sizes._replace(scored=np.zeros(3, int))
    assert needed_sizes(nothing_scored, bins, 2, LENGTHS, None).num_scored == 1


# --- attention rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50), st.sampled_from([1, 2, 5, None]))
def test_joined_sequences_do_not_overlap(lengths: list[int], num_places: int, most: int | None) -> None:
    array = np.array(lengths)
    joined = join_sequences(array, num_places, most)
    num_rows = int(joined.row.max()) + 1
    for row in range(num_rows):
        held = np.flatnonzero(joined.row == row)
        held = held[np.argsort(joined.number[held])]
        assert len(held)
        assert most is None or len(held) <= most
        np.testing.assert_array_equal(joined.number[held], np.arange(len(held)))
        # Back to back from place 0 on.
        np.testing.assert_array_equal(joined.start[held], np.cumsum(array[held]) - array[held])
        assert array[held].sum() <= num_places
    if most is None:
        # At most one row is half empty.
        assert num_rows <= max(2 * sum(lengths) / num_places + 1, 1)
    for found, again in zip(joined, join_sequences(array, num_places, most), strict=True):
        np.testing.assert_array_equal(found, again)


def test_rows_are_filled_exactly_where_the_best_fit_leaves_gaps() -> None:
    # The best fit is 7 5 | 4 4 3 | 3, with a place left in the first row and two in the second.
    lengths = np.array([7, 5, 4, 4, 3, 3])
    joined = join_sequences(lengths, 13, None)
    assert np.bincount(joined.row, weights=lengths).tolist() == [13, 13]
    # It is the one that a lower limit of sequences per row leaves; one that no row exceeds changes nothing, since rows
    # are planned without a limit and packed with the number of sequences that were found.
    assert np.bincount(join_sequences(lengths, 13, 2).row, weights=lengths).tolist() == [12, 8, 6]
    np.testing.assert_array_equal(joined, join_sequences(lengths, 13, 3))


# --- which items share a row


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.integers(1, 8),
    st.none() | st.integers(10, 300),
    st.none() | st.integers(1, 5),
)
def test_bins(slots: list[int], num_rows: int, max_slots: int | None, max_items: int | None) -> None:
    array = np.array(slots)
    bins = plan_step(array, num_rows=num_rows, max_slots=max_slots, max_items=max_items)
    num_bins = bins.num_micro * num_rows
    assert bins.bin_of.min() >= 0
    assert bins.bin_of.max() < num_bins
    loads = np.bincount(bins.bin_of, weights=array, minlength=num_bins)
    if max_slots is None:
        assert bins.num_micro == -(-len(slots) // (num_rows * (max_items or len(slots))))
    else:
        assert loads.max() <= max(max_slots, max(slots))
    if max_items is not None:
        assert np.bincount(bins.bin_of).max() <= max_items
    else:
        # Largest-first guarantees that no bin exceeds the mean by a whole item.
        assert loads.max() <= sum(slots) / num_bins + max(slots) * (1 - 1 / num_bins) + 1e-9
        assert bins.num_micro == 1 or sum(slots) > (bins.num_micro - 1) * num_rows * (max_slots or 0) / 2
    again = plan_step(array, num_rows=num_rows, max_slots=max_slots, max_items=max_items)
    np.testing.assert_array_equal(again.bin_of, bins.bin_of)


def test_no_row_has_more_than_max_items_however_short_they_are() -> None:
    bins = plan_step(np.array([100, 1, 1, 1]), num_rows=2, max_items=2)
    assert bins.num_micro == 1
    assert bins.bin_of.tolist() == [0, 1, 1, 0]


def test_more_rows_than_items_leaves_rows_empty() -> None:
    bins = plan_step(np.array([4, 9]), num_rows=8, max_slots=64)
    assert bins.num_micro == 1
    assert bins.bin_of.tolist() == [1, 0]


# --- the shapes of a run


def needs_of(lengths: np.ndarray) -> st.SearchStrategy[StepNeeds]:
    """Draws the needs of steps whose rows have at least one of the lengths."""
    sizes, last = st.integers(1, 2000), len(lengths) - 1

    def need(micro: int, items: int, slots: int, scored: int, places: int, shortest: int) -> StepNeeds:
        rows = np.where(np.arange(len(lengths)) < shortest, IMPOSSIBLE, -(-places // lengths))
        return StepNeeds(micro, 2, items, slots, scored, rows, rows % 5 + 1)

    return st.builds(need, st.integers(1, 3), st.integers(1, 9), sizes, sizes, sizes, st.integers(0, last))


def holds(shape: PackedShape, need: StepNeeds, lengths: np.ndarray) -> bool:
    index = lengths.tolist().index(shape.length)
    sizes = (*need[:5], need.attention_rows[index], need.per_row[index])
    fields = (
        "num_micro",
        "num_rows",
        "num_items",
        "num_slots",
        "num_scored",
        "num_attention_rows",
        "sequences_per_row",
    )
    return all(size <= getattr(shape, name) for size, name in zip(sizes, fields, strict=True))


@settings(deadline=None)
@given(st.lists(needs_of(row_lengths(500)), min_size=1, max_size=60))
def test_chosen_shapes_hold_every_step(needs: list[StepNeeds]) -> None:
    lengths = row_lengths(500)
    shapes = choose_shapes(needs, lengths)
    assert 1 <= len(shapes) <= MAX_SHAPES
    assert choose_shapes(needs[::-1], lengths) == shapes
    for need in needs:
        assert any(holds(shape, need, lengths) for shape in shapes)
        assert cheapest_shape(need, shapes, lengths) in shapes
    for shape in shapes:
        assert not shape.num_slots % SLOT_MULTIPLE
        assert not shape.num_scored % SCORED_MULTIPLE
        assert shape.num_slots < max(need.num_slots for need in needs) + SLOT_MULTIPLE
        # No more rows of this length than the step with the most.
        rows = [int(need.attention_rows[lengths.tolist().index(shape.length)]) for need in needs]
        assert shape.num_attention_rows in rows


def need_of(items: int, slots: int, length: int, scored: int, most: int = 512) -> StepNeeds:
    """Returns the needs of a step with one sequence per attention row."""
    lengths = row_lengths(most)
    rows = np.where(lengths < length, IMPOSSIBLE, 2 * items)
    return StepNeeds(1, 1, items, slots, scored, rows, np.ones(len(lengths), int))


def test_alike_steps_share_a_shape() -> None:
    needs = [need_of(64, 20000 + 100 * (i % 2), 512, 8000) for i in range(10)]
    assert choose_shapes(needs, row_lengths(512)) == (PackedShape(1, 1, 64, 20160, 128, 1, 512, 8000),)


def test_a_short_run_has_a_single_program() -> None:
    epoch = [need_of(16, 768, 64, 384, 64)] * 9 + [need_of(4, 192, 64, 128, 64)]
    large, small = PackedShape(1, 1, 16, 768, 32, 1, 64, 384), PackedShape(1, 1, 4, 192, 8, 1, 64, 128)
    assert choose_shapes(epoch, row_lengths(64)) == (large,)
    assert choose_shapes(epoch * 20, row_lengths(64)) == (small, large)


def test_many_steps_are_planned_and_their_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    needs = [need_of(8, *map(int, rng.integers(1, 9000, 3)), most=9000) for _ in range(3000)]
    lengths = row_lengths(9000)
    shapes = choose_shapes(needs, lengths)
    assert len(shapes) == 8
    assert len(choose_shapes(needs, lengths, max_shapes=3)) == 3
    assert choose_shapes(sorted(needs, key=lambda need: need[:5]), lengths) == shapes
    assert np.max(shapes, 0).tolist() == [1, 1, 8, 9024, 16, 1, 9216, 9024]  # no more than the next multiples


def test_a_union_of_steps_has_the_cheapest_rows_that_hold_both() -> None:
    lengths = row_lengths(1024)
    # One step has a long sequence, the other none, but as many tokens.
    long = StepNeeds(1, 1, 32, 4096, 2048, np.where(lengths < 1000, IMPOSSIBLE, 5), np.full(16, 9))
    short = StepNeeds(1, 1, 32, 4096, 2048, -(-4800 // lengths), np.full(16, 9))
    assert choose_shapes([long, short], lengths) == (PackedShape(1, 1, 32, 4096, 5, 9, 1024, 2048),)


def log_normal_pairs(medians: tuple[int, int, int], spreads: tuple[float, float, float], max_length: int) -> np.ndarray:
    """Returns lengths [1000, 3] like those of a dataset, truncated at max_length."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(medians), spreads, (1000, 3))).astype(int).clip(1)
    lengths[:, 0] = lengths[:, 0].clip(1, max_length - 1)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], max_length - lengths[:, :1])
    return lengths


SHORT = log_normal_pairs((114, 28, 37), (0.7, 0.95, 0.9), max_length=512)
LONG = log_normal_pairs((146, 244, 273), (1.1, 0.8, 0.7), max_length=1024)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "num_shards", "budget"),
    [(SHORT, 8, 1, 16384), (SHORT, 64, 1, 16384), (SHORT, 64, 8, 2048), (LONG, 4, 1, 16384), (LONG, 32, 1, 16384)],
)
def test_padding_and_shapes_of_an_epoch(lengths: np.ndarray, batch_size: int, num_shards: int, budget: int) -> None:
    run, steps = planned(lengths, batch_size, num_shards=num_shards, max_tokens_per_device=budget)
    num_slots = 0
    for indices in steps:
        bins, shape = run.step(indices)
        assert shape in run.shapes
        assert shape.num_slots <= budget
        assert holds(shape, needed_sizes(run.sizes.of(indices), bins, num_shards, run.lengths, 1), run.lengths)
        num_slots += shape.num_micro * shape.num_rows * shape.num_slots
    assert len(run.shapes) <= 8
    assert lengths.sum() / num_slots >= 0.9


def planned(lengths: np.ndarray, batch_size: int, **options: Any) -> tuple[PackingPlan, list[np.ndarray]]:
    num_rows = len(lengths)
    steps = [
        plan(step, num_rows=num_rows, global_batch_size=batch_size, seed=0, shuffle=True)
        for step in range(num_steps_per_epoch(num_rows, batch_size))
    ]
    return plan_run(pair_sizes(lengths), steps, **options), steps


def test_a_step_that_was_not_planned_gets_a_shape_of_its_own() -> None:
    run, _ = planned(SHORT, 8, num_shards=1, max_tokens_per_device=16384)
    longest = np.argsort(-SHORT.sum(1))[:16]
    bins, shape = run.step(longest)
    assert shape not in run.shapes
    assert SHORT[longest].sum() <= shape.num_slots < SHORT[longest].sum() + SLOT_MULTIPLE
    assert bins.num_micro == 1


def test_micro_batch_size_takes_the_place_of_the_budget() -> None:
    run, steps = planned(SHORT, 64, num_shards=2, micro_batch_size=8)
    assert {run.step(indices).shape.num_micro for indices in steps[:-1]} == {4}
    assert all(run.step(indices).shape.num_items <= 8 for indices in steps)


def test_an_item_longer_than_the_budget_raises_it() -> None:
    run, (indices,) = planned(np.array([[5, 200, 100], [3, 4, 5]]), 2, num_shards=1, max_tokens_per_device=64)
    bins, shape = run.step(indices)
    assert (shape.num_micro, shape.num_slots) == (2, 320)
    assert sorted(bins.bin_of) == [0, 1]


@pytest.mark.parametrize(
    "options",
    [{"max_tokens_per_device": 63}, {"max_tokens_per_device": None}, {"micro_batch_size": 0}],
)
def test_a_limit_without_space_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_device of at least"):
        planned(SHORT, 8, num_shards=1, **options)


def test_rows_have_the_lengths_that_attention_computes() -> None:
    def padded(length: int) -> int:
        return -(-length // 384) * 384

    run, steps = planned(SHORT, 64, num_shards=1, max_tokens_per_device=16384, sequences_per_row=None)
    filled = plan_run(
        run.sizes, steps, num_shards=1, max_tokens_per_device=16384, sequences_per_row=None, padded_length=padded
    )
    assert filled.lengths.tolist() == [384, 768]
    assert {shape.length for shape in run.shapes} - {384, 768}
    for indices in steps:
        bins, shape = filled.step(indices)
        assert shape in filled.shapes
        need = needed_sizes(run.sizes.of(indices), bins, 1, filled.lengths, None)
        assert holds(shape, need, filled.lengths)
