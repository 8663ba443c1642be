"""Slots to attention sequences and back, on the pair of the module's drawing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo import pack
from jdpo.models.packed_attention import (
    PackedSequences,
    num_readers,
    packed_attention,
    packed_sequences,
    to_sequences,
    to_slots,
)

# One row of 8 slots: prompt 0 1, chosen 2 3, rejected 4; two attention rows of 4 places, of which 4 and 3 are real.
NONE = 8
GATHER, LENGTHS = [[[0, 1, 2, 3], [0, 1, 4, 5]]], [[[4], [3]]]
SCATTER = [[0, 1, 2, 3, 6, 0, 0, 0]]
READERS = [[[0, 1, 2, 3, NONE, NONE, NONE, NONE], [4, 5, NONE, NONE, 6, NONE, NONE, NONE]]]
REAL_PLACES = [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture
def layout() -> PackedSequences:
    return packed_sequences(*map(jnp.array, (GATHER, LENGTHS, SCATTER, READERS)))


def test_a_slot_is_read_by_the_sequences_that_hold_it(layout: PackedSequences) -> None:
    assert num_readers(layout).tolist() == [[2, 2, 1, 1, 1, 0, 0, 0]]


def test_a_slot_reads_one_place(layout: PackedSequences) -> None:
    # The prompt's slots read the first sequence; the second sequence's copy of the prompt and its padding are not read.
    assert layout.is_read[0, :7].tolist() == [True, True, True, True, False, False, True]


def test_values_go_to_their_places_and_back(layout: PackedSequences) -> None:
    slots = jnp.arange(16.0).reshape(1, 8, 1, 2)
    sequences = to_sequences(slots, layout)
    assert sequences.shape == (2, 4, 1, 2)
    places = sequences.reshape(8, 2)
    assert (places[:7, 0] / 2).tolist() == [0, 1, 2, 3, 0, 1, 4]
    back = to_slots(10 + sequences, layout)
    assert back.shape == slots.shape
    np.testing.assert_array_equal(back[0, :5], 10 + slots[0, :5])


def test_gradients_are_those_of_scatter_adds(layout: PackedSequences) -> None:
    rng = np.random.default_rng(0)
    slots, places = rng.normal(size=(1, 8, 1, 2)), rng.normal(size=(8, 2))
    places[7] = 0  # padding contributes a zero cotangent

    _, to_sequences_vjp = jax.vjp(lambda x: to_sequences(x, layout), jnp.array(slots))
    expected = np.zeros((8, 2))
    np.add.at(expected, np.reshape(GATHER, -1)[REAL_PLACES], places[REAL_PLACES])
    (gradient,) = to_sequences_vjp(jnp.array(places.reshape(2, 4, 1, 2), jnp.float32))
    np.testing.assert_allclose(gradient.reshape(8, 2), expected, rtol=1e-6)

    _, to_slots_vjp = jax.vjp(lambda x: to_slots(x, layout), jnp.array(places.reshape(2, 4, 1, 2)))
    slots[0, 5:] = 0  # unused slots get no gradient
    expected = np.zeros((8, 2))
    np.add.at(expected, np.array(SCATTER[0]), slots[0, :, 0])
    (gradient,) = to_slots_vjp(jnp.array(slots, jnp.float32))
    np.testing.assert_allclose(gradient.reshape(8, 2)[:7], expected[:7], rtol=1e-6)


def test_attention_of_other_shapes_is_refused() -> None:
    batch = pack([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}], num_slots=8, length=4)
    x = jnp.zeros((1, 8, 2, 3))
    assert packed_attention(lambda q, k, v, segments: v, batch)(x, x, x).shape == x.shape
    with pytest.raises(ValueError, match="expected a key"):
        packed_attention(lambda q, k, v, segments: v, batch)(x, x[:, :7], x)
    with pytest.raises(ValueError, match="attend must return"):
        packed_attention(lambda q, k, v, segments: v[0], batch)(x, x, x)


def test_what_is_no_attention_or_no_batch_is_refused() -> None:
    batch = pack([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}], num_slots=8, length=4)
    with pytest.raises(ValueError, match=r"a function attend\(.* found .* int"):
        packed_attention(3, batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a batch of jdpo\.pack, found .* str"):
        packed_attention(lambda q, k, v, segments: v, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sequences_per_row", "length", "expected"),
    [
        (1, 4, [[1, 1, 1, 1], [1, 1, 1, 0]]),
        (2, 8, [[1, 1, 1, 1, 2, 2, 2, 0]]),
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    ],
)
def test_segments_are_sequences_and_padding(sequences_per_row: int, length: int, expected: list[list[int]]) -> None:
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}
    batch = pack([row], num_slots=8, length=length, sequences_per_row=sequences_per_row)
    seen = []
    x = jnp.zeros((1, 8, 1, 1))
    packed_attention(lambda q, k, v, segments: (seen.append(segments), v)[1], batch)(x, x, x)
    assert seen[0].tolist() == expected
