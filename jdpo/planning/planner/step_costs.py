"""Bytes on the links and time of a planned step: from its compiled program, or by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jdpo.planning.attention_kernels import attention_work
from jdpo.planning.compiled_step import compiled_step
from jdpo.planning.links import Place, links_of, places_of, split_wire_bytes
from jdpo.planning.machines import Machine
from jdpo.planning.measurement import roofline_of
from jdpo.planning.planned_step import PlannedStep
from jdpo.planning.planner.step_search import Candidate
from jdpo.training.fit.estimates import StepEstimate, local_size, tokens_at_once

SLOWEST_COMPILED = 2.0
"""The slow end of the time of a compiled step, relative to its roofline."""

SLOWEST_ESTIMATED = 3.0
"""The slow end of a time by formula, which leaves out more."""

RESTS_ON_COMPILED = (
    "The fast end is a roofline of the compiled program, by data sheets; the slow end is twice that, since published "
    "runs reach 38 % MFU (Llama 3 on H100) to 71 % (MaxText on v5p), half of such bounds to all of them. This program "
    "has not run."
)
"""Grattafiori et al., "The Llama 3 Herd of Models" (2024), table 4: 38 to 43 %, where jdpo's bound for 8B on eight H100
is 74 %. MaxText's tables of performance: 64 to 71 % on v5p and 46 to 67 % on v5e, where the bounds for 8B are 68 and
60 % (benchmarks/results/2026-11-30-aot.md)."""

RESTS_ON_FORMULA = (
    "The fast end is FLOPs, bytes in memory and bytes on the links by formula, at the speeds of the data sheet, and "
    "the slow end three times that: nothing was compiled, and nothing has run."
)


class StepCosts(NamedTuple):
    """Bytes on the links and time of a step, per device.

    Attributes:
      wire_inside, wire_across: bytes that a device sends within its slice, and between slices.
      seconds: the fast and the slow end.
      busy_links: seconds of all collectives on links that carry nothing else.
      logical_flops: of the step on all devices.
      rests_on: where the two ends come from.
    """

    wire_inside: int
    wire_across: int
    seconds: tuple[float, float]
    busy_links: float
    logical_flops: float
    rests_on: str

    def mfu(self, machine: Machine) -> tuple[float, float]:
        """Returns the FLOPs per second of the model as a share of the peak, at the slow and the fast end."""
        ideal = self.logical_flops / machine.num_devices / (machine.chip.tera_flops["bfloat16"] * 1e12)
        fast, slow = self.seconds
        return ideal / slow, ideal / fast


def compiled_costs(machine: Machine, candidate: Candidate) -> StepCosts:
    """Reads the costs of a compiled step from its program; call it while compiling for the machine."""
    planned = candidate.planned
    assert candidate.compilation is not None
    step = compiled_step(machine, planned, candidate.compilation)
    places = places_of(machine, step.devices)
    roofline = roofline_of(step, attention_work(planned))
    seconds = roofline.seconds()
    inside = across = 0.0
    for each in roofline.communications():
        within, between = split_wire_bytes(each.collective, places)
        inside, across = inside + each.times * within, across + each.times * between
    # Links that are busy for longer than the rest takes cannot be hidden by it.
    fast = max(seconds.total, seconds.busy_links)
    return StepCosts(
        round(inside),
        round(across),
        (fast, SLOWEST_COMPILED * fast),
        seconds.busy_links,
        planned.assembly.flops(planned.batch).logical,
        RESTS_ON_COMPILED,
    )


def estimated_costs(machine: Machine, planned: PlannedStep, estimate: StepEstimate) -> StepCosts:
    """Estimates the costs of a step without compiling it; call it while compiling for the machine."""
    assembly, mesh = planned.assembly, planned.assembly.setup.mesh
    flops, chip, links = assembly.flops(planned.batch), machine.chip, links_of(machine)
    num_micro, tokens = int(planned.batch.tokens.shape[0]), tokens_at_once(assembly, planned.batch)
    itemsize = jnp.dtype(assembly.model.compute_dtype).itemsize
    trained = local_size(assembly.state.params, whole=True) / mesh.shape["tensor"]
    weights = trained + local_size(assembly.frozen, whole=True) / mesh.shape["tensor"]
    # Every micro-batch gathers the weights for the forward and the backward pass, and reduces the gradients over the
    # devices that share the weights. Once per step each part is summed over the copies, of several micro-batches in
    # float32.
    sharing = mesh.devices[0, :, :, 0].reshape(-1)
    summed = itemsize if num_micro == 1 else max(itemsize, 4)
    parts = [(num_micro * itemsize * (2 * weights + trained), sharing)]
    parts += [(2 * summed * trained / len(sharing), mesh.devices[:, 0, 0, 0])]
    split = [_split(num_bytes, places_of(machine, list(group))) for num_bytes, group in parts]
    inside, across = (sum(each) for each in zip(*split, strict=True))
    busy_links = inside / links.link + (across / links.across if across else 0.0)
    multiplied = flops.executed / machine.num_devices / (chip.tera_flops["bfloat16"] * 1e12)
    moved = num_micro * (estimate.seconds_per_micro_batch + tokens * estimate.moved_per_token[planned.remat])
    fast = max(multiplied + moved, busy_links)
    return StepCosts(
        round(inside), round(across), (fast, SLOWEST_ESTIMATED * fast), busy_links, flops.logical, RESTS_ON_FORMULA
    )


def _split(num_bytes: float, group: Sequence[Place]) -> tuple[float, float]:
    """Returns what a device sends inside and across slices where a group gathers or reduces an array once."""
    slices = len({place.slice_index for place in group})
    across = num_bytes * (slices - 1) / len(group)
    return num_bytes * (len(group) - 1) / len(group) - across, across
