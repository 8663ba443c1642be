"""Chooses the step of a planned run as the run itself would, in at most three compilations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.devices import target
from jdpo.models.remat import remat_order
from jdpo.planning.compiled_step import Compilation, compile_with_dump
from jdpo.planning.planned_step import PlannedStep
from jdpo.planning.planner.planned_run import PlannedRun
from jdpo.training.fit.compilation import shapes_of
from jdpo.training.fit.estimates import StepEstimate, batch_bytes, estimate_step, tokens_at_once
from jdpo.training.fit.fit_search import MAX_TOKENS_PER_DEVICE, Measured, Trial, best_trial, likely_trials
from jdpo.training.fit.memory_fit import TOKEN_STEP, program_bytes
from jdpo.words import memory

Log = Callable[[str], None]


class Candidate(NamedTuple):
    """A step that was tried.

    Attributes:
      budget: slots of a device's part of a micro-batch, at most.
      compilation: None where it was estimated.
      needed: bytes of a device's memory, or inf where a compiler that refused the step does not tell them.
    """

    remat: str
    budget: int
    planned: PlannedStep
    compilation: Compilation | None
    needed: float

    @property
    def refused(self) -> bool:
        """True if the compiler refused the step."""
        return self.compilation is not None and self.compilation.program is None


class Search(NamedTuple):
    """The result of a search.

    Attributes:
      chosen: the step of the run; the smallest one where none fits.
      fits: True if it needs no more memory than the limit.
      estimate: the memory and time of steps, by which it was found.
      num_compilations: at most three.
    """

    chosen: Candidate
    fits: bool
    estimate: StepEstimate
    num_compilations: int


def search_step(run: PlannedRun, *, limit: float, compiles: bool, log: Log) -> Search:
    """Chooses remat and tokens at once where the config leaves them open; call it while compiling for the machine.

    At most two trials are those of a run (`jdpo.training.fit.fit_search`): the fastest step that fits by estimate, and
    the next one, corrected by what the first needs. Where neither fits, a run would halve the tokens. Here the third is
    the smallest step that the config allows, so that the compiler itself says that the run does not fit.

    Args:
      limit: bytes of a device's memory that a step may take.
      compiles: False: the estimates decide, and nothing is compiled.
    """
    config, platform = run.config, target().platform
    most = config.max_tokens_per_device or MAX_TOKENS_PER_DEVICE[platform]
    widest = run.batches(most).tokens_per_device
    fixed = bool(config.max_tokens_per_device or config.micro_batch_size)
    if not fixed:  # a step that is smaller than the budget needs no more than it has
        most = min(most, -(-widest // TOKEN_STEP) * TOKEN_STEP)
    least = most if fixed else min(TOKEN_STEP, most)
    policies = tuple(remat_order(platform)) if config.remat == "auto" else (config.remat,)
    estimate = estimate_step(run.assembly, policies, run.step(policies[-1], most).batch)
    tried: dict[tuple[str, int], Candidate] = {}
    compiled: dict[Any, Compilation] = {}

    def measure(remat: str, budget: int) -> Measured:
        planned = run.step(remat, budget)
        if compiles:
            program = remat, shapes_of(planned.batch)  # budgets may lead to the same batches
            if program not in compiled:
                log(f"compiling the step with remat {remat} and at most {budget:,} tokens per device at once")
                compiled[program] = _compiled(planned, log)
            found = Candidate(remat, budget, planned, compiled[program], _needed(compiled[program]))
        else:
            needed = estimate.fixed_bytes + batch_bytes(planned.assembly, remat, planned.batch)
            found = Candidate(remat, budget, planned, None, needed)
        tried[remat, budget] = found
        # As a run sees it, which learns no number from a compiler that refuses.
        needed = math.inf if found.refused else found.needed
        return Measured(needed, tokens_at_once(found.planned.assembly, found.planned.batch))

    trials = likely_trials(measure, estimate, policies=policies, most_tokens=most, limit=limit, least_tokens=least)
    if all(trial.found.num_bytes > limit for trial in trials):
        trials.append(Trial(policies[-1], least, measure(policies[-1], least)))
    best = best_trial(trials, estimate, limit)
    return Search(tried[best.remat, best.budget], best.found.num_bytes <= limit, estimate, len(compiled))


def _compiled(planned: PlannedStep, log: Log) -> Compilation:
    compilation = compile_with_dump(planned.assembly.lower_step(planned.batch))
    needed, seconds = _needed(compilation), compilation.seconds
    if compilation.program is None:
        log(f"refused by the compiler after {seconds:.0f} s for lack of memory: it needs {memory(needed)} per device")
    else:
        log(f"compiled in {seconds:.0f} s: it needs {memory(needed)} per device")
    return compilation


def _needed(compilation: Compilation) -> float:
    """Returns the bytes of a device's memory for a program; inf where a compiler that refuses it does not tell them."""
    if compilation.program is not None:
        return program_bytes(compilation.program)
    return compilation.reported_bytes or math.inf
