"""Losses that TRL's DPOTrainer does not have, or has otherwise, against hand derivations in plain Python doubles.

Each formula is written here as its paper has it, from probabilities and odds where the paper starts from them, with
`math` alone: nothing of jdpo, no log-space identities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import preference_loss
from jdpo.losses.reference_free import log1mexp

LENGTHS = ((3, 6), (7, 2), (1, 4), (5, 5))
"""Tokens of (chosen, rejected): shorter, longer, a single token, equal."""

POLICY = ((-2.5, -9.0), (-11.0, -1.25), (-0.125, -6.0), (-4.0, -4.5))
REFERENCE = ((-4.0, -7.5), (-9.5, -3.75), (-0.5, -5.0), (-4.5, -4.25))
"""Summed log-probs of (chosen, rejected); margins of both signs."""


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True)
class Pair:
    """One preference in the papers' terms: y_w is preferred to y_l given a prompt."""

    chosen: float  # log pi(y_w)
    rejected: float  # log pi(y_l)
    reference_chosen: float
    reference_rejected: float
    chosen_length: int  # |y_w|
    rejected_length: int  # |y_l|

    @property
    def log_ratio_gap(self) -> float:
        """log of (pi(y_w) / ref(y_w)) / (pi(y_l) / ref(y_l)), by division of probabilities."""
        chosen = math.exp(self.chosen) / math.exp(self.reference_chosen)
        return math.log(chosen / (math.exp(self.rejected) / math.exp(self.reference_rejected)))


Formula = Callable[[list[Pair]], list[float]]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def pairs_of(policy: Any, reference: Any = REFERENCE) -> list[Pair]:
    rows = zip(np.asarray(policy).tolist(), np.asarray(reference).tolist(), LENGTHS, strict=True)
    return [Pair(w, l_, ref_w, ref_l, n_w, n_l) for (w, l_), (ref_w, ref_l), (n_w, n_l) in rows]


def cdpo(*, beta: float, e: float) -> Formula:
    """Mitchell's note on noisy preferences, eq. 3: cross-entropy against a label that is right 1 - e of the time."""

    def loss(pair: Pair) -> float:
        p = sigmoid(beta * pair.log_ratio_gap)
        return -(1 - e) * math.log(p) - e * math.log(1 - p)

    return lambda pairs: [loss(pair) for pair in pairs]


def robust(*, beta: float, e: float) -> Formula:
    """rDPO (2403.00409): the loss whose mean under flips of rate e is the loss without flips."""

    def loss(pair: Pair) -> float:
        as_labelled = -math.log(sigmoid(beta * pair.log_ratio_gap))
        flipped = -math.log(sigmoid(-beta * pair.log_ratio_gap))
        return ((1 - e) * as_labelled - e * flipped) / (1 - 2 * e)

    return lambda pairs: [loss(pair) for pair in pairs]


def exo(*, beta: float, e: float) -> Formula:
    """EXO (2402.00856, eqs. 13-16, K = 2): KL of softmax over the two of beta log ratios from (1 - e, e)."""

    def loss(pair: Pair) -> float:
        unnormalised = (
            (math.exp(pair.chosen) / math.exp(pair.reference_chosen)) ** beta,
            (math.exp(pair.rejected) / math.exp(pair.reference_rejected)) ** beta,
        )
        p = [weight / sum(unnormalised) for weight in unnormalised]
        return sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, (1 - e, e), strict=True))

    return lambda pairs: [loss(pair) for pair in pairs]


def discopop(*, beta: float, tau: float) -> Formula:
    """DiscoPOP (2406.08414, eq. 5): logistic and exponential loss of beta rho, blended by a gate at beta rho / tau."""

    def loss(pair: Pair) -> float:
        rho = beta * pair.log_ratio_gap
        gate = sigmoid(rho / tau)
        return (1 - gate) * math.log(1 + math.exp(-rho)) + gate * math.exp(-rho)

    return lambda pairs: [loss(pair) for pair in pairs]


def simpo(*, beta: float, gamma: float) -> Formula:
    """SimPO (2405.14734, eq. 6)."""

    def loss(pair: Pair) -> float:
        reward = beta / pair.chosen_length * pair.chosen - beta / pair.rejected_length * pair.rejected
        return -math.log(sigmoid(reward - gamma))

    return lambda pairs: [loss(pair) for pair in pairs]


def cpo(*, beta: float, alpha: float) -> Formula:
    """CPO (2401.08417): L_prefer + alpha L_NLL, the NLL a mean over the batch's chosen tokens (its published code)."""

    def losses(pairs: list[Pair]) -> list[float]:
        tokens = sum(pair.chosen_length for pair in pairs)
        nll = sum(-pair.chosen for pair in pairs) / tokens
        prefer = [-math.log(sigmoid(beta * math.log(math.exp(p.chosen) / math.exp(p.rejected)))) for p in pairs]
        return [value + alpha * nll for value in prefer]

    return losses


def orpo(*, weight: float) -> Formula:
    """ORPO (2403.07691, eqs. 3-7): P is the geometric mean of token probabilities, odds = P / (1 - P)."""

    def loss(pair: Pair) -> float:
        chosen = math.exp(pair.chosen) ** (1 / pair.chosen_length)
        rejected = math.exp(pair.rejected) ** (1 / pair.rejected_length)
        odds_ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        return -math.log(chosen) - weight * math.log(sigmoid(math.log(odds_ratio)))

    return lambda pairs: [loss(pair) for pair in pairs]


def simper(pair: Pair) -> float:
    """SimPER (2502.00883): perplexity of rejected minus of chosen, both inverted; perplexity is exp(-mean log-prob)."""
    chosen = math.exp(-pair.chosen / pair.chosen_length)
    rejected = math.exp(-pair.rejected / pair.rejected_length)
    return 1 / rejected - 1 / chosen


CASES: list[tuple[dict[str, Any], Formula]] = [
    ({"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1}, cdpo(beta=0.3, e=0.1)),
    ({"loss_type": "sigmoid", "beta": 1.5, "label_smoothing": 0.4}, cdpo(beta=1.5, e=0.4)),
    ({"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1}, robust(beta=0.3, e=0.1)),
    ({"loss_type": "robust", "beta": 1.5, "label_smoothing": 0.45}, robust(beta=1.5, e=0.45)),
    ({"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.1}, exo(beta=0.3, e=0.1)),
    ({"loss_type": "exo_pair", "beta": 1.5, "label_smoothing": 1e-3}, exo(beta=1.5, e=1e-3)),
    ({"loss_type": "discopop", "beta": 0.3}, discopop(beta=0.3, tau=0.05)),
    ({"loss_type": "discopop", "beta": 0.7, "discopop_tau": 1.0}, discopop(beta=0.7, tau=1.0)),
    ({"loss_type": "simpo", "beta": 2.0}, simpo(beta=2.0, gamma=0.5)),
    ({"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4}, simpo(beta=2.5, gamma=1.4)),
    ({"loss_type": "cpo", "beta": 0.1}, cpo(beta=0.1, alpha=1.0)),
    ({"loss_type": "cpo", "beta": 0.8, "cpo_alpha": 0.25}, cpo(beta=0.8, alpha=0.25)),
    ({"loss_type": "orpo"}, orpo(weight=0.1)),
    ({"loss_type": "orpo", "orpo_lambda": 1.3}, orpo(weight=1.3)),
    ({"loss_type": "simper"}, lambda pairs: [simper(pair) for pair in pairs]),
]
each_case = pytest.mark.parametrize(
    ("options", "formula"), CASES, ids=["-".join(map(str, options.values())) for options, _ in CASES]
)


def losses(policy: Any, **options: Any) -> Any:
    """jdpo's losses [b] of log-probs [b, 2]."""
    chosen_lengths, rejected_lengths = jnp.array(LENGTHS).T
    return preference_loss(
        *jnp.asarray(policy).T,
        *jnp.asarray(REFERENCE).T,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        **options,
    ).losses


@each_case
def test_value_is_the_paper_s(options: dict[str, Any], formula: Formula) -> None:
    found, expected = losses(POLICY, **options), formula(pairs_of(POLICY))
    assert found.dtype == np.float64
    if options["loss_type"] == "cpo":  # the token mean belongs to the batch, and is split over pairs by their tokens
        assert found.mean() == pytest.approx(np.mean(expected), rel=1e-12)
    else:
        assert found.tolist() == pytest.approx(expected, rel=1e-11)


@each_case
def test_gradient_is_the_paper_s(options: dict[str, Any], formula: Formula) -> None:
    """The mean over pairs, by central differences of the paper's formula, so that no derivative is shared."""
    step = 1e-5
    expected = np.zeros((len(LENGTHS), 2))
    for index in np.ndindex(expected.shape):
        moved = [np.array(POLICY), np.array(POLICY)]
        moved[0][index] += step
        moved[1][index] -= step
        above, below = (np.mean(formula(pairs_of(policy))) for policy in moved)
        expected[index] = (above - below) / (2 * step)
    found = jax.grad(lambda policy: losses(policy, **options).mean())(jnp.asarray(POLICY))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_cpo_s_nll_is_each_pair_s_own_tokens() -> None:
    """-l_w b / (all chosen tokens) per pair: at l_w = -2.5 of 16 chosen tokens over 4 pairs, 2.5 * 4 / 16 = 0.625."""
    with_nll, without = losses(POLICY, loss_type="cpo"), losses(POLICY, loss_type="cpo", cpo_alpha=0.0)
    assert (with_nll - without).tolist() == pytest.approx([0.625, 2.75, 0.03125, 1.0], rel=1e-12)


def test_orpo_is_its_published_code() -> None:
    """xfactlab/orpo: log_odds = (pos - neg) - (log1p(-exp(pos)) - log1p(-exp(neg))), ratio = logsigmoid(log_odds)."""
    pos, neg = (np.array(POLICY) / np.array(LENGTHS)).T
    log_odds = (pos - neg) - (np.log1p(-np.exp(pos)) - np.log1p(-np.exp(neg)))
    ratio = np.log(1 / (1 + np.exp(-log_odds)))
    np.testing.assert_allclose(losses(POLICY, loss_type="orpo", orpo_lambda=0.1), -pos - 0.1 * ratio, rtol=1e-12)


def test_log_odds_are_exact_next_to_certainty_and_to_0() -> None:
    """log(1 - exp(x)): near 0 it is log(-x) + x/2 + x^2/24, far below 0 it is -exp(x); float32 is enough for both."""
    near, far = np.float32([-1e-6, -1e-4, -1e-2]), np.float32([-17, -20, -40])
    expected = np.log(-np.float64(near)) + np.float64(near) / 2 + np.float64(near) ** 2 / 24
    np.testing.assert_allclose(log1mexp(jnp.asarray(near)), expected, rtol=1e-6)
    np.testing.assert_allclose(log1mexp(jnp.asarray(far)), -np.exp(np.float64(far)), rtol=1e-5)


def test_simpo_is_its_published_code() -> None:
    """princeton-nlp/SimPO: pi_logratios - gamma_beta_ratio, inside logsigmoid(beta * ...); gamma = beta * ratio."""
    beta, ratio = 2.5, 0.3
    chosen, rejected = (np.array(POLICY) / np.array(LENGTHS)).T
    expected = -np.log(1 / (1 + np.exp(-beta * (chosen - rejected - ratio))))
    found = losses(POLICY, loss_type="simpo", beta=beta, simpo_gamma=beta * ratio)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_discopop_is_its_published_code() -> None:
    """luchris429/DiscoPOP gates by sigmoid(logits), without beta: the paper's form where tau = beta = 0.05."""
    beta = 0.05
    logits = np.subtract(POLICY, REFERENCE) @ [1, -1]
    gate = 1 / (1 + np.exp(-logits))
    expected = np.log(1 + np.exp(-beta * logits)) * (1 - gate) + np.exp(-beta * logits) * gate
    np.testing.assert_allclose(losses(POLICY, loss_type="discopop", beta=beta), expected, rtol=1e-12)


def test_robust_is_unbiased() -> None:
    """The purpose of rDPO: its mean over flips of rate e is the plain DPO loss."""
    e, beta = 0.2, 0.7
    flipped = preference_loss(
        *jnp.asarray(POLICY).T[::-1], *jnp.asarray(REFERENCE).T[::-1], loss_type="robust", beta=beta, label_smoothing=e
    ).losses
    mean = (1 - e) * losses(POLICY, loss_type="robust", beta=beta, label_smoothing=e) + e * flipped
    np.testing.assert_allclose(mean, losses(POLICY, loss_type="sigmoid", beta=beta), rtol=1e-12)


def test_cdpo_rests_where_its_label_says() -> None:
    """The gradient of cDPO and of EXO is zero exactly where s(beta D) = 1 - e, the note's stationary point."""
    e, beta = 0.1, 0.5
    margin = math.log((1 - e) / e) / beta
    for loss_type in ("sigmoid", "exo_pair"):

        def loss(chosen: Any, loss_type: str = loss_type) -> Any:
            zero = jnp.zeros(1)
            return preference_loss(
                chosen[None], zero, zero, zero, loss_type=loss_type, beta=beta, label_smoothing=e
            ).losses[0]

        assert jax.grad(loss)(jnp.float64(margin)) == pytest.approx(0.0, abs=1e-12)
        assert jax.grad(loss)(jnp.float64(margin + 1)) > 1e-3 > -1e-3 > jax.grad(loss)(jnp.float64(margin - 1))


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo", "simper"])
def test_no_reference_is_read(loss_type: str) -> None:
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), jnp.array(LENGTHS).T, strict=True))
    bare = preference_loss(*jnp.asarray(POLICY).T, loss_type=loss_type, **lengths)
    assert bare.losses.tolist() == losses(POLICY, loss_type=loss_type).tolist()
    per_token = np.array(POLICY) / (1 if loss_type == "cpo" else np.array(LENGTHS))
    np.testing.assert_allclose(bare.chosen_rewards, 0.1 * per_token[:, 0], rtol=1e-12)
    np.testing.assert_allclose(bare.rejected_rewards, 0.1 * per_token[:, 1], rtol=1e-12)
