"""Sentences on what to change where a run does not fit a machine, or uses it badly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jdpo.config import OptimizerConfig
from jdpo.models.remat import remat_order
from jdpo.planning.machines import Machine
from jdpo.planning.planner.planned_run import PlannedRun, planned_run
from jdpo.planning.planner.step_costs import StepCosts
from jdpo.planning.planner.step_search import Search
from jdpo.training.fit.estimates import estimate_step, local_bytes, tokens_at_once
from jdpo.words import memory, percent

MUCH_PADDING = 1.25
"""Slots per token from which on padding is worth a sentence."""


def suggestions_if_missing(
    run: PlannedRun, search: Search, devices: Sequence[Any], lengths: Sequence[Sequence[int]], limit: float
) -> tuple[str, ...]:
    """Returns what would make a run fit, by estimate: another optimizer, or how many devices."""
    config, chosen = run.config, search.chosen
    expected = search.estimate.num_bytes(chosen.remat, tokens_at_once(chosen.planned.assembly, chosen.planned.batch))
    # What the compiled step needs beyond its estimate is taken to be the same for others.
    beyond = max(chosen.needed - expected, 0) if math.isfinite(chosen.needed) else 0.0
    found = []
    if config.max_tokens_per_device or config.micro_batch_size or config.remat != "auto":
        found.append("Leave remat, max_tokens_per_device and micro_batch_size out, so that the smallest step is tried.")
    if config.lora in (None, False) and config.optimizer.name == "adamw":
        other = dataclasses.replace(config, optimizer=OptimizerConfig(name="adamw_bf16"))
        needed = beyond + _smallest(planned_run(other, devices, lengths))
        how = "and fits" if needed <= limit else "and does not fit either"
        found.append(
            f"optimizer adamw_bf16 needs about {memory(needed)} per device by estimate, {how}; weights and moments "
            "are then bfloat16 (docs/memory.md)."
        )
    state = local_bytes((run.assembly.state, run.assembly.frozen)) * len(devices)
    least = math.ceil(state / limit)
    if least > len(devices):
        found.append(
            f"Weights, moments and a reference take {memory(state)}: at least {least} such devices hold them, before "
            "gradients and activations."
        )
    if config.lora in (None, False):
        found.append("lora: true trains adapters next to frozen weights, without gradients and moments of the others.")
    return tuple(found)


def suggestions_if_wasteful(run: PlannedRun, padding: float, costs: StepCosts, machine: Machine) -> tuple[str, ...]:
    """Returns what would make better use of a machine that a run fits."""
    found = []
    if padding > MUCH_PADDING:
        found.append(
            f"{percent(1 - 1 / padding)} of the slots are padding: a larger global_batch_size, or fewer devices, "
            "wastes less."
        )
    if costs.busy_links > costs.seconds[0] * 0.999:
        found.append(
            f"Communication between the devices of {machine.name} takes longer than the arithmetic: more tokens per "
            "device (a larger global_batch_size), or fewer devices, use them better."
        )
    return tuple(found)


def _smallest(run: PlannedRun) -> float:
    """Returns the bytes that the smallest step of a run needs by estimate."""
    config = run.config
    remat = remat_order("tpu")[-1] if config.remat == "auto" else config.remat
    step = run.step(remat, config.max_tokens_per_device or 64)
    estimate = estimate_step(run.assembly, [remat], step.batch)
    return estimate.num_bytes(remat, tokens_at_once(run.assembly, step.batch))
