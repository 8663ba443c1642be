"""Win rates of the answers after against those before: raw, by the order of showing, and at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from jdpo.comparison.compare_document import Better, Figure, Values
from jdpo.comparison.intervals import LEVEL, Estimate, share_of

RIDGE = 1e-3
"""Penalty of the length coefficient per comparison. Without one, a judge that always prefers the longer answer would
have an infinite coefficient."""
FEW_ON_A_SIDE = 0.1
"""If fewer comparisons are on a side of equal length, equal lengths are outside of what was seen."""


class Won(NamedTuple):
    """The outcome of one comparison.

    Attributes:
      prompt_id: of the prompt.
      sample: the number of both answers.
      won: 1 if the answer after won, 0 if it lost, 0.5 for a tie; None if there is no verdict.
      longer: by how many tokens (or characters) the answer after is longer.
      firsts: for each order in which they were shown, whether the first one won; empty for a score.
    """

    prompt_id: str
    sample: int
    won: float | None
    longer: int
    firsts: tuple[bool, ...] = ()


class WinRates(NamedTuple):
    """The figures of all comparisons, and sentences on what limits them."""

    figures: list[Figure]
    warnings: list[str]


def win_rates(outcomes: Sequence[Won]) -> WinRates:
    """Computes win rates. Comparisons without a verdict are counted and left out."""
    decided = [one for one in outcomes if one.won is not None]
    warnings = []
    if unknown := len(outcomes) - len(decided):
        warnings.append(
            f"{unknown:,} of {len(outcomes):,} comparisons have no verdict and are left out of the win rate"
        )
    if not decided:
        return WinRates([], warnings)
    prompts = np.array([one.prompt_id for one in decided])
    won = np.array([one.won for one in decided], float)
    longer = np.array([one.longer for one in decided], float)
    at_equal_length = length_controlled(won, longer, prompts)
    figures = [
        _figure("win_rate", "Win rate against the model before", "up", share_of(won, prompts), prompts),
        _figure("win_rate.length_controlled", "Win rate at equal length", "up", at_equal_length, prompts),
    ]
    shown = [(one.prompt_id, first) for one in outcomes for first in one.firsts]
    if shown:
        prompts = np.array([prompt for prompt, _ in shown])
        share = share_of(np.array([first for _, first in shown], float), prompts)
        figures.append(_figure("win_rate.first_shown", "Verdicts for the first shown", "neither", share, prompts))
    on_a_side = smaller_side(longer)
    if on_a_side < FEW_ON_A_SIDE:
        warnings.append(
            "win_rate.length_controlled is extrapolated: one model's answers are the longer ones in all but "
            f"{100 * on_a_side:.0f} % of the comparisons"
        )
    return WinRates(figures, warnings)


def smaller_side(longer: np.ndarray) -> float:
    """Returns the share of comparisons on the less frequent side of equal length; those of equal length are on both."""
    return min(float((longer >= 0).mean()), float((longer <= 0).mean()))


def _figure(name: str, title: str, better: Better, estimate: Estimate, prompts: np.ndarray) -> Figure:
    values = Values(after=estimate, num_prompts=len(np.unique(prompts)), num_rows=len(prompts))
    return Figure(name=name, title=title, section="wins", unit="share", better=better, all=values, neutral=0.5)


def length_controlled(won: np.ndarray, longer: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimates the win rate that answers of equal length would have.

    As in AlpacaEval's length-controlled win rate (Dubois et al., 2024, arXiv 2404.04475), without its term for the
    difficulty of an instruction: logit P(win) = theta + phi * tanh(difference in length / its standard deviation), and
    the win rate is sigmoid(theta).

    Args:
      won: float [n], 0, 0.5 or 1.
      longer: float [n], length after minus length before.
      prompts: [n].
    """
    if np.all(won == won[0]) and smaller_side(longer) >= FEW_ON_A_SIDE:
        # The outcome never depended on length, and theta may be infinite.
        return share_of(won, prompts)
    spread = float(longer.std())
    # Not centred, since the point of interest is a difference of 0.
    design = np.stack([np.ones(len(won)), np.tanh(longer / spread) if spread > 0 else np.zeros(len(won))], axis=1)
    fit = _fit(won, design)
    num_prompts = len(np.unique(prompts))
    if num_prompts < 2:
        return Estimate(_sigmoid(fit.theta))
    half = float(stats.t.ppf((1 + LEVEL) / 2, num_prompts - 1)) * _standard_error(fit, prompts)
    return Estimate(_sigmoid(fit.theta), _sigmoid(fit.theta - half), _sigmoid(fit.theta + half))


class _Fit(NamedTuple):
    theta: float
    hessian: np.ndarray  # [2, 2], of the penalized log-likelihood
    scores: np.ndarray  # [n, 2], gradient of each comparison


def _fit(won: np.ndarray, design: np.ndarray) -> _Fit:
    """Fits the logistic regression by Newton's method."""
    coefficients, penalty = np.zeros(2), np.diag([0.0, RIDGE * len(won)])
    # A little of it on theta as well: outcomes that lengths separate would leave theta without a bound.
    penalty[0, 0] = 1e-3 * RIDGE * len(won)
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ coefficients))
        scores = design * (won - p)[:, None]
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty
        step = np.linalg.solve(hessian, scores.sum(0) - penalty @ coefficients)
        # A full step from far away may overshoot.
        coefficients += step * min(1.0, 2 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return _Fit(float(coefficients[0]), hessian, scores)


def _standard_error(fit: _Fit, prompts: np.ndarray) -> float:
    """Returns the standard error of theta: of the model, or over prompts, whichever is larger.

    Comparisons of one prompt resemble each other, which only the spread over prompts shows. If lengths decide every
    comparison nothing is left to spread, and only the model knows how little that tells about equal lengths.
    """
    inverse = np.linalg.inv(fit.hessian)
    _, index = np.unique(prompts, return_inverse=True)
    influence = fit.scores @ inverse[0]
    by_prompt = np.bincount(index, influence - influence.mean())
    over_prompts = len(by_prompt) / (len(by_prompt) - 1) * float(np.square(by_prompt).sum())
    return float(np.sqrt(max(over_prompts, inverse[0, 0])))


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(value, -700, 700))))
