"""Batches that cannot be scored, seen outside jit and left alone under it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import dpo_loss, make_dpo_loss, preference_loss
from jdpo.losses.argument_checks import check_batch, check_scores
from jdpo.types import PreferenceBatch

PARAMS = {"head": np.linspace(-1, 1, 8 * 8).reshape(8, 8).astype(np.float32)}


def apply_fn(params: Any, tokens: Any, attention_mask: Any) -> Any:
    del attention_mask
    return jnp.asarray(params["head"])[tokens]


def batch_of(*, without: tuple[tuple[int, int], ...] = (), first_only: bool = False, **fields: Any) -> PreferenceBatch:
    """Four pairs of six tokens, two of them the prompt; `without` has (pair, side) that get no completion token."""
    mask = np.zeros((4, 2, 6), bool)
    mask[..., 2:] = True
    for pair, side in without:
        mask[pair, side] = False
        mask[pair, side, 0] = first_only
    tokens = np.arange(48).reshape(4, 2, 6) % 8
    return PreferenceBatch(tokens, np.ones((4, 2, 6), bool), mask)._replace(**fields)


@pytest.mark.parametrize("first_only", [False, True], ids=["all False", "position 0 alone"])
def test_a_side_without_a_completion_token_is_named(first_only: bool) -> None:
    batch = batch_of(without=((1, 1), (3, 0)), first_only=first_only)
    named = "the rejected side of pair 1 and the chosen side of pair 3"
    with pytest.raises(ValueError, match=named):
        dpo_loss(PARAMS, PARAMS, batch, apply_fn=apply_fn)
    with pytest.raises(ValueError, match=named):
        make_dpo_loss(apply_fn)(PARAMS, PARAMS, jax.tree.map(jnp.asarray, batch))
    with pytest.raises(ValueError, match=named):
        jax.grad(lambda params: dpo_loss(params, PARAMS, batch, apply_fn=apply_fn)[0])(PARAMS)


def test_many_empty_sides_are_counted() -> None:
    batch = batch_of(without=tuple((pair, side) for pair in range(4) for side in range(2)))
    with pytest.raises(ValueError, match="and 3 more"):
        dpo_loss(PARAMS, PARAMS, batch, apply_fn=apply_fn)


def test_a_pair_of_weight_0_may_be_empty() -> None:
    weights = np.array([1, 0, 1, 1], np.float32)
    loss, _ = dpo_loss(PARAMS, PARAMS, batch_of(without=((1, 0),), weights=weights), apply_fn=apply_fn)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="the chosen side of pair 2"):
        dpo_loss(PARAMS, PARAMS, batch_of(without=((1, 0), (2, 0)), weights=weights), apply_fn=apply_fn)


def test_traced_masks_and_weights_are_left_alone() -> None:
    loss_fn = make_dpo_loss(apply_fn)
    empty = batch_of(without=((1, 0),))
    assert np.isfinite(jax.jit(loss_fn)(PARAMS, PARAMS, empty)[0])

    def loss_of(weights: Any) -> Any:
        return loss_fn(PARAMS, PARAMS, empty._replace(weights=weights))[0]

    assert np.isfinite(jax.jit(loss_of)(np.ones(4, np.float32)))
    assert np.isfinite(jax.grad(loss_of)(np.ones(4, np.float32))).all()
    batches = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), empty)
    losses = jax.vmap(lambda one: loss_fn(PARAMS, PARAMS, one)[0], in_axes=(jax.tree.map(lambda _: 0, empty),))(batches)
    assert losses.shape == (2,)


def test_a_tuple_in_the_place_of_a_batch_says_what_is_expected() -> None:
    batch = batch_of()
    for given in (tuple(batch), batch._asdict(), (batch, batch)):
        with pytest.raises(ValueError, match=r"expected a jdpo\.PreferenceBatch\(tokens, attention_mask"):
            dpo_loss(PARAMS, PARAMS, given, apply_fn=apply_fn)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"found a (tuple|dict) without tokens"):
            make_dpo_loss(apply_fn)(PARAMS, PARAMS, given)


def test_an_unknown_option_names_the_nearest() -> None:
    loss_fn = make_dpo_loss(apply_fn)
    with pytest.raises(ValueError, match="unknown option 'normaliser'; did you mean 'normalizer'"):
        loss_fn(PARAMS, PARAMS, batch_of(), normaliser=4)
    with pytest.raises(ValueError, match="label_smoothing is given to make_dpo_loss"):
        loss_fn(PARAMS, PARAMS, batch_of(), label_smoothing=0.1)
    with pytest.raises(ValueError, match="did you mean 'label_smoothing'"):
        dpo_loss(PARAMS, PARAMS, batch_of(), apply_fn=apply_fn, label_smooth=0.1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_a_length_of_0_names_pair_and_side(loss_type: str) -> None:
    logps = [np.zeros(3, np.float32)] * 4
    lengths = {"chosen_lengths": np.array([4, 2, 3]), "rejected_lengths": np.array([1, 5, 0])}
    with pytest.raises(ValueError, match=r"rejected_lengths must be at least 1.*the rejected side of pair 2"):
        preference_loss(*logps, loss_type=loss_type, **lengths)
    with pytest.raises(ValueError, match="the rejected side of pair 2"):
        jax.grad(lambda chosen: preference_loss(chosen, *logps[1:], loss_type=loss_type, **lengths).losses.sum())(
            logps[0]
        )
    traced = jax.jit(lambda lengths: preference_loss(*logps, loss_type=loss_type, **lengths).losses)(lengths)
    assert np.isfinite(traced).all()


def test_a_length_of_0_in_a_pair_of_weight_0_is_nothing() -> None:
    logps = [np.zeros(2, np.float32)] * 4
    lengths = {"chosen_lengths": np.array([0, 2]), "rejected_lengths": np.array([1, 5])}
    losses = preference_loss(*logps, pair_weights=np.array([0.0, 1.0]), **lengths).losses
    np.testing.assert_allclose(losses, [0, np.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="the chosen side of pair 0"):
        preference_loss(*logps, pair_weights=np.array([1.0, 0.0]), **lengths)


def test_scores_are_named_where_they_cannot_be_used() -> None:
    check_scores(np.array([0.5, 2.0]), None)
    check_scores(np.array([0.5, -1.0, np.nan]), np.array([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="expected score_margins"):
        check_scores(None, None)
    for value in (0.0, -0.5, np.nan):
        with pytest.raises(ValueError, match=f"found {value:g} for pair 1"):
            check_scores(np.array([1.0, value]), np.array([1.0, 2.0]))
    jax.jit(lambda scores: check_scores(scores, None))(jnp.zeros(2))  # no value to see


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"score_margins must be \[b\], one for each of 4 pairs, found \(3,\)"):
        check_batch(batch_of(score_margins=np.ones(3)))
