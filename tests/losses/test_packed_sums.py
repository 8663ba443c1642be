"""Sums over the scored tokens of packed rows, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.losses.pair_logps import belongs, completion_sums, tail_weights
from jdpo.losses.pair_losses import packed_totals
from jdpo.types import PackedBatch

# Two rows of up to two pairs: chosen 0 and 2, rejected 1 and 3; 4 is padding.
PAIR = jnp.array([[0, 0, 1, 2, 3, 3, 3, 4], [0, 1, 1, 4, 4, 4, 4, 4]])
LOGPS = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, jnp.nan], [1.0, 2.0, 4.0] + [jnp.nan] * 5])


def test_each_token_belongs_to_its_completion_and_padding_to_none() -> None:
    found = np.asarray(belongs(PAIR, 4))
    assert found.shape == (2, 8, 4)
    assert found.argmax(-1)[0, :7].tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert found.sum(-1).tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_sums_are_of_each_completion() -> None:
    of_completion = belongs(PAIR, 4)
    assert completion_sums(LOGPS, of_completion).tolist() == [[[3, 4], [8, 112]], [[1, 6], [0, 0]]]
    of_one_side = completion_sums(LOGPS, of_completion, num_sides=1)
    assert of_one_side.tolist() == [[[3], [4], [8], [112]], [[1], [6], [0], [0]]]


def test_padding_gets_no_gradient() -> None:
    gradient = jax.grad(lambda logps: completion_sums(logps, belongs(PAIR, 4))[..., 1].sum())(LOGPS)
    assert gradient.tolist() == [[0, 0, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]


def test_tokens_past_the_shorter_side_weigh_alpha() -> None:
    of_completion = belongs(PAIR, 4)
    lengths = completion_sums(jnp.ones_like(PAIR), of_completion)
    weights = tail_weights(of_completion, lengths, 0.25, jnp.float32)
    assert weights.dtype == jnp.float32
    # Row 0: chosen 2 and rejected 1 share 1 token, chosen 1 and rejected 3 share 1. Row 1: 1 and 2 share 1.
    assert weights.tolist() == [[1, 0.25, 1, 1, 1, 0.25, 0.25, 1], [1, 1, 0.25, 1, 1, 1, 1, 1]]


def test_totals_count_pairs_and_chosen_tokens_by_their_weight() -> None:
    batch = PackedBatch(**dict.fromkeys(PackedBatch._fields))._replace(
        logp_pair=PAIR, pair_weight=jnp.array([[1.0, 0.5], [2.0, 0.0]])
    )
    # Chosen tokens: two of weight 1 and one of weight 0.5 in row 0; one of weight 2 in row 1.
    assert [float(total) for total in packed_totals(batch)] == [3.5, 4.5]
    padding = batch._replace(pair_weight=jnp.zeros((2, 2)), logp_pair=jnp.full_like(PAIR, -1))
    assert [float(total) for total in packed_totals(padding)] == [0, 0]
