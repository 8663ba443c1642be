"""Chooses the remat policy and the tokens per device at once: the fastest by estimate of those that fit the memory.

Estimates (jdpo/training/fit/estimates.py) name a candidate, its step is compiled, and what the program needs corrects
the estimates. So one compilation is enough where everything fits, and two nearly always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jdpo.processes import max_over_processes
from jdpo.training.fit.estimates import StepEstimate
from jdpo.training.fit.memory_fit import TOKEN_STEP, Fit, compile_if_memory_allows, program_bytes
from jdpo.training.step.objectives import Batch

MAX_TOKENS_PER_DEVICE = {"cpu": 16384, "gpu": 32768, "tpu": 32768}
"""Tokens of a device's part of a micro-batch where memory sets no limit: more make no step faster."""

ENOUGH_TOKENS = 4096
"""Where no estimate fits, trials begin with this many tokens."""

MOST_TRIALS = 2
"""Compilations at most, as long as one of them fits; with the first step's own shape there are three before it."""

AIM = 0.97
"""The share of the limit that a step which has not been compiled yet should need by the corrected estimates."""

WORTH_A_TRIAL = 0.03
"""A further compilation should make steps faster by at least this share, by estimate."""

REFUSED = 1.5
"""Where the compiler refuses a step, it is taken to need this many times the limit."""

Lower = Callable[[str, int], tuple[Batch, Any]]
"""(remat policy, tokens per device at most) -> the shape that needs the most memory, as a batch of
jax.ShapeDtypeStructs, and the training step lowered for it (`jax.stages.Lowered`)."""


class Measured(NamedTuple):
    """A compiled step: bytes that a device needs for it, inf where it could not be compiled, and tokens it has."""

    num_bytes: float
    tokens: int


class Trial(NamedTuple):
    """A step that was compiled: its policy, its budget of tokens, and what was found."""

    remat: str
    budget: int
    found: Measured


def choose_fit(
    lower: Lower,
    estimate: StepEstimate,
    *,
    tokens_at_once: Callable[[Batch], int],
    policies: Sequence[str],
    most_tokens: int,
    limit: float,
    fixed_tokens: bool = False,
) -> tuple[Fit, dict[Batch, Any]]:
    """Finds the fastest step, by estimate, of those whose compiled program fits the memory.

    Where none fits, it is the last policy with as many tokens as fit; with one sequence at a time where even that is
    too much, so that the device decides. Every process must call this.

    Args:
      lower: gives the steps to compile; each is compiled once.
      estimate: memory and time of the step.
      tokens_at_once: returns the tokens of a device's part of a micro-batch.
      policies: the one that needs the least memory last.
      most_tokens: more are of no use.
      limit: bytes that a device has.
      fixed_tokens: True: the tokens are given, and only the policy is chosen.

    Returns:
      the fit, and the programs that were compiled for its policy, by the batches that they take.

    Raises:
      jax.errors.JaxRuntimeError: a compilation failed, and not for lack of memory.
    """
    # By shape, as several budgets may lead to the same batches.
    programs: dict[tuple[str, Batch], Any] = {}

    def measure(policy: str, tokens: int) -> Measured:
        batch, lowered = lower(policy, tokens)
        if (policy, batch) not in programs:
            programs[policy, batch] = compile_if_memory_allows(lowered)
        # The processes must agree on one fit.
        return Measured(max_over_processes(program_bytes(programs[policy, batch])), tokens_at_once(batch))

    least_tokens = most_tokens if fixed_tokens else min(TOKEN_STEP, most_tokens)
    fit = search_fit(
        measure, estimate, policies=policies, most_tokens=most_tokens, least_tokens=least_tokens, limit=limit
    )
    chosen = {batch: program for (policy, batch), program in programs.items() if policy == fit.remat}
    return fit, {batch: program for batch, program in chosen.items() if program is not None}


def search_fit(
    measure: Callable[[str, int], Measured],
    estimate: StepEstimate,
    *,
    policies: Sequence[str],
    most_tokens: int,
    limit: float,
    least_tokens: int = TOKEN_STEP,
) -> Fit:
    """The search of `choose_fit`, in few trials.

    Args:
      measure: compiles the step of a policy with so many tokens at most.
      least_tokens: fewer are not tried.

    >>> estimate = StepEstimate(
    ...     fixed_bytes=0, bytes_per_token={"dots": 8, "full": 1}, seconds_per_token={"dots": 3.0, "full": 4.0}
    ... )
    >>> def measure(remat, tokens):
    ...     return Measured(tokens * (9 if remat == "dots" else 1), tokens)
    >>> search_fit(measure, estimate, policies=["dots", "full"], most_tokens=8192, limit=40_000)
    Fit(remat='dots', max_tokens_per_device=4288, bytes_needed=38592)
    """
    trials = likely_trials(
        measure, estimate, policies=policies, most_tokens=most_tokens, limit=limit, least_tokens=least_tokens
    )
    if not _fitting(trials, limit):
        trials += _halved(
            measure, trials, policies[-1], max(min(ENOUGH_TOKENS, most_tokens), least_tokens), least_tokens, limit
        )
    return fit_of(best_trial(trials, estimate, limit))


def likely_trials(
    measure: Callable[[str, int], Measured],
    estimate: StepEstimate,
    *,
    policies: Sequence[str],
    most_tokens: int,
    limit: float,
    least_tokens: int = TOKEN_STEP,
) -> list[Trial]:
    """Tries the fastest steps that fit by the estimates, each corrected by the one before: at most MOST_TRIALS.

    Args:
      measure, least_tokens: see `search_fit`.
    """
    trials: list[Trial] = []
    while len(trials) < MOST_TRIALS:
        budgets = {remat: _budget(estimate, trials, remat, most_tokens, limit) for remat in policies}
        able = [remat for remat in policies if budgets[remat] >= least_tokens]
        if not able:
            break
        # Of policies that are as fast, min takes the first.
        remat = min(able, key=lambda remat: estimate.seconds(remat, budgets[remat]))
        fastest = min(
            (estimate.seconds(trial.remat, trial.budget) for trial in _fitting(trials, limit)), default=math.inf
        )
        if estimate.seconds(remat, budgets[remat]) > (1 - WORTH_A_TRIAL) * fastest:
            break
        trials.append(Trial(remat, budgets[remat], measure(remat, budgets[remat])))
    return trials


def best_trial(trials: Sequence[Trial], estimate: StepEstimate, limit: float) -> Trial:
    """Returns the fastest trial of those that fit, by estimate; the last one if none does."""
    return min(_fitting(trials, limit) or trials[-1:], key=lambda trial: estimate.seconds(trial.remat, trial.budget))


def fit_of(trial: Trial) -> Fit:
    """Returns the fit that a trial found."""
    needed = trial.found.num_bytes
    return Fit(trial.remat, trial.budget, int(needed) if math.isfinite(needed) else None)


def _fitting(trials: Sequence[Trial], limit: float) -> list[Trial]:
    return [trial for trial in trials if trial.found.num_bytes <= limit]


def _halved(
    measure: Callable[[str, int], Measured],
    trials: Sequence[Trial],
    remat: str,
    enough: int,
    least_tokens: int,
    limit: float,
) -> list[Trial]:
    """Halves the tokens under a policy until they fit; for estimates that are far off, and steps that fit nowhere."""
    tried = [trial for trial in trials if trial.remat == remat]
    halved, budget = tried[-1:], min((trial.budget for trial in tried), default=2 * enough)
    while budget > least_tokens:
        budget = max(budget // 2 // TOKEN_STEP * TOKEN_STEP, least_tokens)
        halved.append(Trial(remat, budget, measure(remat, budget)))
        if halved[-1].found.num_bytes <= limit:
            break
    return halved


def _budget(estimate: StepEstimate, trials: Sequence[Trial], remat: str, most_tokens: int, limit: float) -> int:
    """Returns the most tokens that fit by the estimates, as the last trial corrects them."""
    if any(trial[:2] == (remat, most_tokens) and trial.found.num_bytes <= limit for trial in trials):
        return most_tokens
    fixed, per_token = estimate.fixed_bytes, estimate.bytes_per_token[remat]
    if trials:
        last = trials[-1]
        found = min(last.found.num_bytes, REFUSED * limit)
        expected = estimate.num_bytes(last.remat, last.found.tokens)
        # Either way the error is on the safe side: fewer tokens after too much was needed, and more after too little.
        if found > expected:
            fixed, per_token = fixed * found / expected, per_token * found / expected
        elif found > fixed:
            per_token *= (found - fixed) / (expected - fixed)
        else:
            fixed = found
    tokens = max((AIM * limit - fixed) / per_token, 0)
    return most_tokens if tokens >= most_tokens else int(tokens) // TOKEN_STEP * TOKEN_STEP
