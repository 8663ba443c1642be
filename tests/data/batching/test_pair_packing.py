"""jdpo.pack: what it accepts and refuses, its sizes, and values read back. The sums: tests/losses/test_packed.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jdpo
from jdpo.types import PackedBatch
from tests.data.batching.packed_tools import unpack

ROW: dict[str, Any] = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}
LONGER: dict[str, Any] = {"prompt_ids": [], "chosen_ids": np.arange(4), "rejected_ids": (3, 4, 5)}


def test_the_worked_example_of_the_layout() -> None:
    batch = jdpo.pack([ROW | {"origin": "not read"}], num_slots=8, num_pairs=1, length=4, num_scored=4)
    assert batch.gather.tolist() == [[[0, 1, 2, 3], [0, 1, 4, 3]]]
    assert (batch.lengths.tolist(), batch.scatter.tolist()) == ([[[4], [3]]], [[0, 1, 2, 3, 6, 0, 0, 0]])
    assert (batch.logp_slot.tolist(), batch.logp_target.tolist()) == ([[1, 2, 1, 0]], [[7, 2, 8, 0]])
    assert batch.logp_pair.tolist() == [[0, 0, 1, 2]]


def test_sizes() -> None:
    batch = jdpo.pack([ROW, LONGER, ROW], num_rows=2)
    assert (batch.tokens.shape, batch.gather.shape, batch.logp_slot.shape) == ((2, 64), (2, 4, 64), (2, 64))
    fixed = jdpo.pack([ROW], num_rows=3, num_micro=2, num_slots=9, num_pairs=2, length=5, num_scored=7)
    assert (fixed.tokens.shape, fixed.gather.shape, fixed.logp_slot.shape) == ((2, 3, 9), (2, 3, 4, 5), (2, 3, 7))
    assert fixed.pair_weight.sum() == 1


def test_several_sequences_per_attention_row() -> None:
    batch = jdpo.pack([ROW, LONGER, ROW], num_rows=2, sequences_per_row=4)
    assert (batch.gather.shape, batch.lengths.shape) == ((2, 1, 64), (2, 1, 4))
    assert [sorted(row) for row in batch.lengths[:, 0].tolist()] == [[0, 0, 3, 4], [3, 3, 4, 4]]
    fixed = jdpo.pack([ROW], num_pairs=5, length=7, sequences_per_row=2, num_attention_rows=3)
    assert fixed.gather.shape == (1, 3, 7)
    assert fixed.lengths.tolist() == [[[4, 3], [0, 0], [0, 0]]]


def test_both_limits_of_a_row_hold() -> None:
    rows = [ROW] * 4 + [LONGER] * 2
    batch = jdpo.pack(rows, num_rows=3, num_slots=12, num_pairs=2)
    assert (batch.pair_weight.sum(-1).tolist(), batch.tokens.shape) == ([2, 2, 2], (3, 12))
    assert {*batch.pair_row.reshape(-1).tolist()} == set(range(6))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2]),
    st.integers(1, 3),
    st.integers(0, 2**16),
)
def test_every_token_is_found_again(
    lengths: list[tuple[int, int, int]], num_rows: int, num_micro: int | None, sequences_per_row: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: rng.integers(0, 99, n) for name, n in zip(names, sizes, strict=True)} for sizes in lengths]
    reference = [tuple(rng.normal(size=len(row[name])) for name in names[1:]) for row in rows]
    batch = jdpo.pack(
        rows, num_rows=num_rows, num_micro=num_micro, sequences_per_row=sequences_per_row, reference_logps=reference
    )
    with_micro = batch if num_micro else PackedBatch._make(None if a is None else a[None] for a in batch)
    for index, sides in unpack(with_micro).items():
        for name, side in zip(names[1:], sides, strict=True):
            expected = np.concatenate([rows[index]["prompt_ids"], rows[index][name]])
            np.testing.assert_array_equal(side.tokens, expected)
    assert batch.logp_reference is not None
    for got, given_sides, row in zip(jdpo.unpack_logps(batch, batch.logp_reference), reference, rows, strict=True):
        for values, given_values in zip(got, given_sides, strict=True):
            first = 0 if len(row["prompt_ids"]) else 1  # no token predicts the first one
            np.testing.assert_array_equal(values[first:], given_values[first:])
            assert (values[:first] == 0).all()


def test_masks() -> None:
    masked = ROW | {"chosen_mask": [0, 1], "rejected_mask": [True]}
    batch = jdpo.pack([masked, ROW])
    assert batch.logp_target[0, batch.logp_pair[0] < 4].tolist() == [2, 8, 7, 2, 8]
    ones = np.ones(batch.logp_slot.shape, np.float32)
    assert [side.tolist() for side in jdpo.unpack_logps(batch, ones)[0]] == [[0, 1], [1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ({name: [ids] for name, ids in ROW.items()}, "rows is a dict of columns"),
        ([ROW, ["a"]], r"rows\[1\]: expected a dict"),
        ([{"prompt_ids": [1], "chosen": [2]}], r"rows\[0\] has no chosen_ids and no rejected_ids"),
        ([ROW | {"chosen_ids": [0.5]}], r"rows\[0\]\['chosen_ids'\].*float64"),
        ([ROW | {"chosen_ids": "text"}], r"\['chosen_ids'\]: expected a list of token ids"),
        ([ROW | {"chosen_ids": [True]}], r"\['chosen_ids'\]: expected a list of token ids, found bool"),
        ([ROW | {"prompt_ids": [[1], [2, 3]]}], r"\['prompt_ids'\]: expected a list of token ids"),
        (iter([ROW]), r"give list\(rows\)"),
        ([ROW | {"rejected_ids": [-1]}], "from 0 to .*, found -1"),
        ([ROW | {"rejected_ids": [2**31]}], "found 2147483648"),
        ([ROW | {"rejected_ids": []}], "no rejected token to score"),
        ([LONGER | {"chosen_ids": [1]}], "no chosen token to score"),
        ([ROW | {"chosen_mask": [0, 0], "rejected_mask": [1]}], "no chosen token to score"),
        ([ROW | {"chosen_mask": [0, 1]}], "has chosen_mask alone"),
        ([ROW | {"chosen_mask": [1], "rejected_mask": [1]}], r"'chosen_mask'\]: expected 2 values"),
        ([ROW | {"chosen_mask": [1, 2], "rejected_mask": [1]}], r"'chosen_mask'\]: expected 2 values"),
    ],
)
def test_rows_that_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jdpo.pack(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows must be a whole number"),
        ({"num_slots": 1.5}, "num_slots must be a whole number"),
        ({"num_slots": 6}, r"rows\[1\] has 7 tokens .*num_slots=6.*num_slots=7"),
        ({"length": 3}, r"rows\[0\] has 4 tokens .*length=3.*length=4"),
        ({"sequences_per_row": 0}, "sequences_per_row must be a whole number"),
        ({"num_attention_rows": 5}, "num_attention_rows must be 4"),
        ({"length": 8, "sequences_per_row": 2, "num_attention_rows": 1}, "num_attention_rows must be at least 2"),
        ({"num_scored": 4}, "num_scored must be at least 8"),
        ({"num_slots": 8}, "Pass num_micro=2"),
        ({"num_pairs": 1}, "Pass num_micro=2"),
        ({"reference_logps": [([0.0, 0.0], [0.0])]}, "each of 2 rows, found 1"),
        ({"reference_logps": [([0.0, 0.0], [0.0]), ([0.0], [0.0])]}, r"reference_logps\[1\].*\(4,\) and \(3,\)"),
        ({"reference_logps": [1.0, 2.0]}, r"reference_logps\[0\]: expected \(chosen, rejected\)"),
        ({"reference_logps": [([0, 0], [0]), ([0] * 4, [0] * 3)]}, r"reference_logps\[0\]: expected a float"),
        ({"score_margins": [1.0]}, "expected 2 numbers"),
        ({"score_margins": [1.0, float("nan")]}, r"above 0, found nan for rows\[1\]"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jdpo.pack([ROW, LONGER], **options)


def test_values_of_another_shape_are_refused() -> None:
    batch = jdpo.pack([ROW])
    with pytest.raises(ValueError, match="one value per scored token"):
        jdpo.unpack_logps(batch, np.zeros((1, 3)))
