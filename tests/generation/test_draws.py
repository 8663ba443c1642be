"""Draws: the set of top_k and top_p, the distribution within it, and what has no influence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare

from jdpo.generation.draws import draw
from jdpo.generation.values import Sampling

LOGITS = np.random.default_rng(0).normal(0, 1, 12).astype(np.float32)
DRAWS = 10_000

jitted = jax.jit(draw, static_argnames="sampling")


def keys(num: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), num)


def tokens(logits: np.ndarray, sampling: Sampling, num: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Returns [rows, num], draws from every row of logits."""
    repeated = jnp.repeat(jnp.asarray(logits), num, axis=0)
    return np.asarray(jitted(repeated, keys(len(repeated), seed), sampling=sampling)[0]).reshape(-1, num)


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the probabilities of a row's draws, by sorting: ties with the last token of a set belong to it."""
    warm = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None:
        warm = np.where(warm >= np.sort(warm)[::-1][: sampling.top_k][-1], warm, -np.inf)
    probabilities = softmax(warm)
    ordered = np.sort(probabilities)[::-1]
    # Distinct probabilities and what is more probable; 1e-9 is for float64's own rounding.
    before = np.cumsum(ordered) - ordered
    last = ordered[before < sampling.top_p - 1e-9].min()
    kept = np.where(probabilities >= last, probabilities, 0) if sampling.top_p < 1 else probabilities
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.full), 1.7])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.8, None), (0.5, None), (1.0, 4), (0.8, 6)])
def test_draws_have_the_distribution_of_the_set(temperature: float, top_p: float, top_k: int | None) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    share = expected(LOGITS, sampling)
    assert (share > 0).sum() >= 2
    counts = np.bincount(tokens(LOGITS[None], sampling)[0], minlength=len(LOGITS))
    assert p_value(counts, share) > 0.001
    # The test would notice a temperature that is half again as high.
    assert p_value(counts, expected(LOGITS, Sampling(temperature=1.5 * temperature, top_p=top_p, top_k=top_k))) < 0.001


def p_value(counts: np.ndarray, share: np.ndarray) -> float:
    """Returns the probability of counts at least as far from their expectations; 0 if a token cannot be drawn."""
    if (counts[share == 0] > 0).any():
        return 0.0
    kept = share > 0
    return chisquare(counts[kept], share[kept] * counts.sum()).pvalue


ADVERSARIAL = {
    "random": np.random.default_rng(1).normal(0, 1, 300),
    "flat": np.random.default_rng(2).normal(0, 0.01, 300),
    "equal": np.zeros(300),
    "one": np.where(np.arange(300) == 137, 50.0, 0.0),
    "ties": np.round(np.random.default_rng(3).normal(0, 1.5, 300)),
    "excluded": np.where(np.arange(300) % 3 == 1, np.random.default_rng(4).normal(0, 2, 300), -np.inf),
    "far": np.random.default_rng(5).normal(0, 400, 300),
    "two tie": np.where(np.isin(np.arange(300), [5, 299]), 30.0, -30.0),
}
"""More than two blocks of tokens, the last one not full."""


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.95, None), (0.3, None), (1e-6, None), (1.0, 7), (0.5, 40), (0.9, 1000)]
)
def test_exactly_the_set_is_drawn(top_p: float, top_k: int | None) -> None:
    logits = np.stack(list(ADVERSARIAL.values())).astype(np.float32)
    sampling = Sampling(top_p=top_p, top_k=top_k)
    for name, row, drawn in zip(ADVERSARIAL, logits, tokens(logits, sampling, 600, seed=2), strict=True):
        share = expected(row, sampling)
        assert (share[drawn] > 0).all(), name
        likely = np.flatnonzero(share > 0.04)  # left out of 600 draws with probability 1e-11
        assert set(likely) <= set(drawn), name


def test_ties_with_the_last_of_the_set_belong_to_it() -> None:
    row = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    assert set(tokens(row, Sampling(top_k=2))[0]) == {0, 1, 2}
    assert set(tokens(row, Sampling(top_p=0.5))[0]) == {0, 1, 2}
    assert set(tokens(row, Sampling(top_p=0.3))[0]) == {0}
    assert set(tokens(row, Sampling(top_p=0.85))[0]) == set(range(5))
    # What top_k leaves has probability 1 again: 0.4 of 0.8 is the half.
    assert set(tokens(row, Sampling(top_k=3, top_p=0.45))[0]) == {0}
    assert set(tokens(row, Sampling(top_p=0.45))[0]) == {0, 1, 2}


def test_rare_tokens_of_a_large_vocabulary_have_their_share() -> None:
    # 31,999 tokens of 1.5e-5 each, together as probable as the first.
    row = np.zeros((1, 32000), np.float32)
    row[0, 0] = np.log(31999)
    drawn = tokens(row, Sampling(), 400)[0]
    assert 150 < (drawn == 0).sum() < 250
    assert chisquare(np.bincount(drawn[drawn > 0] // 4000, minlength=8)).pvalue > 0.001
    assert set(tokens(row, Sampling(top_p=0.49), 50)[0]) == {0}


def test_greedy_takes_the_first_of_the_most_probable() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-jnp.inf, -jnp.inf, -5.0, -jnp.inf], [2.0, 2.0, 2.0, 2.0]])
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_p=0.5, top_k=2)):
        assert jitted(logits, keys(3), sampling=sampling)[0].tolist() == [1, 2, 0]
    # A temperature that float32 cannot hold.
    assert jitted(logits[1:2], keys(1), sampling=Sampling(temperature=1e-45))[0].tolist() == [2]
    assert set(tokens(np.asarray(logits[:1]), Sampling(temperature=1e-45), 50)[0]) == {1, 3}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probabilities_are_of_the_model_itself(dtype: jnp.dtype) -> None:
    logits = jnp.asarray(np.random.default_rng(7).normal(0, 3, (20, 500)), dtype)
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.3), Sampling(top_p=0.2), Sampling(top_k=5)):
        drawn, logps = jitted(logits, keys(20), sampling=sampling)
        assert (drawn.dtype, logps.dtype) == (jnp.int32, jnp.float32)
        wanted = log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(20), np.asarray(drawn)]
        np.testing.assert_allclose(logps, wanted, atol=1e-5)


def test_a_vocabulary_of_one_and_logits_that_are_no_numbers() -> None:
    assert [x.tolist() for x in jitted(jnp.zeros((1, 1)), keys(1), sampling=Sampling(top_p=0.9, top_k=1))] == [
        [0],
        [0.0],
    ]
    bad = jnp.array([[0.0, jnp.nan, 0.0], [jnp.inf, 0.0, 0.0], [-jnp.inf] * 3, [0.0, 1.0, 2.0]])
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(top_p=0.9), Sampling(top_k=2, top_p=0.5)):
        drawn, logps = jitted(bad, keys(4), sampling=sampling)  # ends, within the vocabulary, and says so
        assert ((drawn >= 0) & (drawn < 3)).all()
        assert np.isnan(logps).tolist() == [True, True, True, False]


def test_a_draw_depends_on_its_own_row_and_key_alone() -> None:
    sampling = Sampling(top_p=0.6, temperature=1.3)
    logits = jnp.asarray(np.random.default_rng(8).normal(0, 2, (64, 200)).astype(np.float32))
    together = jitted(logits, keys(64), sampling=sampling)[0]
    assert together[:3].tolist() == jitted(logits[:3], keys(64)[:3], sampling)[0].tolist()
    one = functools.partial(draw, sampling=sampling)
    mapped = jax.vmap(one)(logits.reshape(8, 8, -1), keys(64).reshape(8, 8))[0]
    assert mapped.reshape(-1).tolist() == together.tolist()
    assert len(set(tokens(np.asarray(logits[:1]), sampling, 200)[0])) > 5


@pytest.mark.parametrize("spec", [PartitionSpec(None, "tensor"), PartitionSpec("tensor", None)])
def test_eight_devices_draw_the_same(spec: PartitionSpec) -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    logits = jnp.asarray(np.random.default_rng(9).normal(0, 2, (48, 1024)).astype(np.float32))
    for sampling in (Sampling(temperature=0), Sampling(top_p=0.7), Sampling(top_k=9, top_p=0.9)):
        alone, together = (
            jitted(x, keys(48), sampling=sampling) for x in (logits, jax.device_put(logits, NamedSharding(mesh, spec)))
        )
        assert alone[0].tolist() == together[0].tolist()
        np.testing.assert_allclose(alone[1], together[1], atol=1e-5)
