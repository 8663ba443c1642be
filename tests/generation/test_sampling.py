from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.generation.sampling import Sampling, check_sampling, keep_top_k, keep_top_p, sample

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 20)).astype(np.float32)


def kept_by_hand(logits: np.ndarray, top_k: int | None, top_p: float | None) -> list[set[int]]:
    """Keeps, row by row, the k best tokens, then the fewest best ones whose probabilities reach p."""
    rows = []
    for row in logits:
        order = np.argsort(-row)[:top_k]
        probabilities = np.exp(row[order]) / np.exp(row[order]).sum()
        if top_p is not None:
            order = order[: np.searchsorted(np.cumsum(probabilities), top_p) + 1]
        rows.append(set(order.tolist()))
    return rows


def kept(logits: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits)]


@pytest.mark.parametrize("top_k", [1, 3, 20, 50])
def test_top_k_equals_numpy(top_k: int) -> None:
    assert kept(keep_top_k(LOGITS, top_k)) == kept_by_hand(LOGITS, top_k, None)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_equals_numpy(top_p: float) -> None:
    assert kept(keep_top_p(jnp.asarray(LOGITS), top_p)) == kept_by_hand(LOGITS, None, top_p)


def test_top_p_of_one_keeps_everything() -> None:
    assert kept(keep_top_p(jnp.asarray(LOGITS), 1.0)) == [set(range(20))] * 5


def test_draws_follow_the_thinned_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9)
    ((*_, allowed),) = [kept_by_hand(LOGITS[:1] / 0.7, 4, 0.9)]
    row = np.repeat(LOGITS[:1], 4000, axis=0)
    counts = np.bincount(sample(jnp.asarray(row), jax.random.key(0), sampling), minlength=20)
    assert set(np.flatnonzero(counts).tolist()) == allowed
    weights = np.where(np.isin(np.arange(20), list(allowed)), np.exp(LOGITS[0] / 0.7), 0)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.03)


def test_greedy_takes_the_best_and_a_row_does_not_depend_on_its_neighbours() -> None:
    key = jax.random.key(3)
    assert sample(jnp.asarray(LOGITS), key, Sampling(temperature=0.0)).tolist() == LOGITS.argmax(1).tolist()
    alone = sample(jnp.asarray(LOGITS[:2]), key, Sampling())
    together = sample(jnp.asarray(LOGITS), key, Sampling())
    assert alone.tolist() == together[:2].tolist()
    assert len(set(sample(jnp.zeros((50, 20)), key, Sampling()).tolist())) > 5


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature: expected 0"),
        (Sampling(temperature=float("nan")), "temperature: expected 0"),
        (Sampling(top_k=0), "top_k: expected 1 or more"),
        (Sampling(top_p=0.0), "top_p: expected a share"),
        (Sampling(top_p=1.5), "top_p: expected a share"),
    ],
)
def test_settings_out_of_range(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(sampling)
