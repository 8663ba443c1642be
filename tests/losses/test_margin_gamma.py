"""The offset of ODPO (arXiv 2402.10571): values by hand, gradients, and the way of the scores from rows to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.losses import dpo_loss, preference_loss
from jdpo.losses.pair_logps import TokenScores, packed_features
from jdpo.losses.settings import loss_settings
from jdpo.training.sanity_checks import start_loss
from jdpo.training.setup.batches import PackedBatches
from jdpo.training.setup.row_order import check_scores
from tests.losses.test_pair_losses import apply_fn, batch, params
from tests.training.setup.test_batches import padded, prepared, scored_rows

Words = Callable[..., list[str]]


def loss_of(chosen: Any, rejected: Any, scores: Any, **options: Any) -> Any:
    """Losses of log-ratios against a reference at 0, in float64."""
    zeros = jnp.zeros(len(scores))
    return preference_loss(
        jnp.asarray(chosen), jnp.asarray(rejected), zeros, zeros, score_margins=jnp.asarray(scores), **options
    ).losses


def test_values_by_hand() -> None:
    """beta 0.1, a = 3, b = -1: beta D = 0.4. Score differences e^2, 1 and 1/e give o = 2 gamma, 0 and -gamma."""
    with jax.enable_x64(True):
        scores = [math.e**2, 1.0, math.exp(-1)]
        found = loss_of([3.0] * 3, [-1.0] * 3, scores, margin_gamma=0.3)
        # 1 / (1 + exp(-z)) at z = 0.4 - 0.6, 0.4 - 0 and 0.4 + 0.3
        expected = [-math.log(1 / (1 + math.exp(-z))) for z in (-0.2, 0.4, 0.7)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found, [0.7981389, 0.5130153, 0.4031860], atol=5e-8)
        # Smoothed by e = 0.1: -0.9 ls(z) - 0.1 ls(-z), and ls(-z) = ls(z) - z.
        smoothed = loss_of([3.0] * 3, [-1.0] * 3, scores, margin_gamma=0.3, label_smoothing=0.1)
        np.testing.assert_allclose(
            smoothed, [x + 0.1 * z for x, z in zip(expected, (-0.2, 0.4, 0.7), strict=True)], rtol=1e-12
        )


def test_the_gradient_is_larger_where_the_scores_are_further_apart() -> None:
    """d loss / d a = -beta s(o - beta D): at beta D = 0.4, o = 0.3 ln 5 = 0.482831, -0.1 s(0.082831) = -0.0520696."""
    with jax.enable_x64(True):
        slope = jax.grad(lambda a: loss_of(a, [-1.0], [5.0], margin_gamma=0.3).sum())(jnp.array([3.0]))
        assert float(slope[0]) == pytest.approx(-0.1 / (1 + math.exp(0.4 - 0.3 * math.log(5))), rel=1e-12)
        assert float(slope[0]) == pytest.approx(-0.0520696, abs=5e-8)


def test_without_margin_gamma_scores_are_not_read() -> None:
    plain = loss_of([3.0], [-1.0], [5.0])
    assert plain.tolist() == loss_of([3.0], [-1.0], [-7.0], margin_gamma=0.0).tolist()
    assert float(plain[0]) == pytest.approx(0.513015, abs=1e-6)


def test_in_a_list_only_the_losses_that_honour_it_have_the_offset() -> None:
    both = loss_of([3.0], [-1.0], [5.0], loss_type=["sigmoid", "hinge"], margin_gamma=0.3)
    parts = loss_of([3.0], [-1.0], [5.0], margin_gamma=0.3) + loss_of([3.0], [-1.0], [5.0], loss_type="hinge")
    np.testing.assert_allclose(both, parts, rtol=1e-6)


def test_scores_that_are_missing_or_not_above_0_are_refused() -> None:
    zeros = jnp.zeros(2)
    with pytest.raises(ValueError, match="expected score_margins"):
        preference_loss(zeros, zeros, zeros, zeros, margin_gamma=0.3)
    with pytest.raises(ValueError, match="found 0 for pair 1"):
        loss_of([1.0, 1.0], [0.0, 0.0], [1.0, 0.0], margin_gamma=0.3)
    with pytest.raises(ValueError, match="expected score_margins"):
        dpo_loss(params(0), params(1), batch(), apply_fn=apply_fn, margin_gamma=0.3)


def test_a_batch_with_scores_gives_the_mean_over_its_real_pairs() -> None:
    x = batch(1)._replace(weights=np.array([1, 1, 1, 1, 0], np.float32))
    scores = np.array([0.5, 1, 2, 4, np.nan], np.float32)
    loss, metrics = dpo_loss(
        params(0), params(1), x._replace(score_margins=scores), apply_fn=apply_fn, margin_gamma=0.7, beta=0.2
    )
    margins = []
    for pair in range(4):
        one = jax.tree.map(lambda array, pair=pair: array[pair : pair + 1], x)
        _, of_pair = dpo_loss(params(0), params(1), one, apply_fn=apply_fn, beta=0.2)
        margins.append(float(of_pair["rewards/margins"]))
    offsets = 0.7 * np.log(scores[:4])
    assert loss == pytest.approx(np.log1p(np.exp(offsets - margins)).mean(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-5), "rewards are without the offset"


def test_packed_rows_bring_the_scores_of_their_pairs(run_words: Words, tmp_path: Path) -> None:
    path = scored_rows(tmp_path, (4, 1.5), (1, 0.5), (9, 1), (3, 2))
    task, data = prepared(load_config(DPOConfig, None, run_words(datasets=path, margin_gamma=0.5)))
    indices = np.array([2, 0, 3])
    flat = padded(task, data, [indices], rows=2).make(indices).batch.score_margins
    np.testing.assert_array_equal(flat, np.float32([[8, 2.5], [1, 1]]))
    made = PackedBatches(task, data, [indices], num_shards=2, max_tokens_per_device=128).make(indices)
    micro = jax.tree.map(lambda array: jnp.asarray(array[0]), made.batch)
    scored = TokenScores(jnp.zeros(micro.logp_target.shape))
    settings = loss_settings("sigmoid", margin_gamma=0.5)[0]
    features = packed_features({}, {}, micro, logps_fn=lambda *_: scored, settings=settings)
    assert features.score_margins is not None
    np.testing.assert_array_equal(features.score_margins[made.rows.at], [8, 2.5, 1])
    with pytest.raises(ValueError, match="expected score_margins"):
        packed_features({}, {}, micro._replace(pair_score_margin=None), logps_fn=lambda *_: scored, settings=settings)


def test_a_run_refuses_rows_without_scores_and_expects_no_loss_at_the_start(run_words: Words, tmp_path: Path) -> None:
    path = scored_rows(tmp_path, (4, 1.5), None, (9, 1), (3, 2))
    _, data = prepared(load_config(DPOConfig, None, run_words(datasets=path, margin_gamma=0.5)))
    with pytest.raises(ValueError, match=r"scored.jsonl:2: margin_gamma needs pairs .* no scores"):
        check_scores(data)
    assert start_loss(loss_settings("sigmoid", margin_gamma=0.5)[0]) is None
    assert start_loss(loss_settings("sigmoid")[0]) == pytest.approx(math.log(2), rel=1e-6)
