"""Steps as a run makes them, timed: batches made ahead, reports read one step late."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.chips import peak_flops
from jdpo.data.batching.loader import prefetch
from jdpo.models.attention import compiled_attention
from jdpo.sharding.placement import fetch, micro_batch_sharding, place
from jdpo.training.fit.assembly import assemble
from jdpo.training.fit.memory_fit import memory_limit, program_bytes
from jdpo.training.fit.preparation import Preparation, prepare_steps, remat_policies
from jdpo.training.setup.batches import StepBatch, shapes_in_order
from jdpo.training.setup.run_setup import Setup

LEAST_STEPS = 3
"""Steps that are timed, whatever they take; the one before them, in which a GPU chooses kernels, is not."""


class Timed(NamedTuple):
    """A step that was timed: seconds, FLOPs that the mathematics needs and that ran, tokens and slots."""

    seconds: float
    logical: float
    executed: float
    num_tokens: int
    real_slots: int
    num_slots: int


class Prepared(NamedTuple):
    """Steps that are compiled, and the seconds until the first and all of their programs were there."""

    steps: Preparation
    seconds_to_fit: float
    seconds_to_compile: float
    log: list[str]


def prepare(setup: Setup, cache: Any, pool: ThreadPoolExecutor) -> Prepared:
    """Fits the steps to the memory, as a run does, and compiles all of their programs."""
    began, lines = time.perf_counter(), list[str]()
    policies = remat_policies(setup)
    assembly = assemble(setup, reference="cached", remat=policies[0])
    assemblies = {remat: assembly.with_remat(remat) for remat in policies}
    prepared = prepare_steps(setup, assemblies, cache, pool, lines.append, limit=memory_limit())
    fitted = time.perf_counter()
    prepared.programs.prepare(shapes_in_order(prepared.batches, map(setup.row_plan.step, range(setup.num_steps))))
    prepared.programs.wait()
    return Prepared(prepared, fitted - began, time.perf_counter() - fitted, lines)


def run_steps(
    setup: Setup, prepared: Preparation, state: Any, frozen: Any, *, seconds: float
) -> tuple[Any, list[Timed], list[float]]:
    """Makes steps until the time is used up or the run ends.

    Returns:
      the state, what was timed, and the loss of every step.

    Raises:
      FloatingPointError: a loss or an update is not finite.
    """
    sharding = micro_batch_sharding(setup.mesh)

    def make_batch(step: int) -> tuple[StepBatch, Any]:
        batch, rows = prepared.batches.make(setup.row_plan.step(step))
        return StepBatch(place(batch, sharding), rows), prepared.assembly.flops(batch)

    timed: list[Timed] = []
    losses: list[float] = []
    launched: Any = None
    began = lap = time.perf_counter()
    for (batch, rows), flops in prefetch(make_batch, range(setup.num_steps)):
        state, report = prepared.programs.of(batch)(state, frozen, batch)
        if launched is not None:
            lap = _read(launched, lap, timed, losses)
        launched = report, rows, flops
        if time.perf_counter() - began > seconds and len(losses) > LEAST_STEPS:
            break
    _read(launched, lap, timed, losses)
    return state, timed[1:], losses


def _read(launched: Any, lap: float, timed: list[Timed], losses: list[float]) -> float:
    """Waits for a step, adds what it took, and returns the time at its end."""
    on_device, rows, flops = launched
    report = fetch(on_device)
    now = time.perf_counter()
    if not report.finite:
        raise FloatingPointError(f"step {len(losses) + 1}: loss {report.loss}, gradient norm {report.grad_norm}")
    losses.append(float(report.loss))
    timed.append(Timed(now - lap, flops.logical, flops.executed, rows.num_tokens, rows.real_slots, rows.num_slots))
    return now


def figures(setup: Setup, prepared: Prepared, timed: list[Timed], losses: list[float]) -> dict[str, Any]:
    """Returns the figures of timed steps, as a run logs them, next to what jdpo reckoned."""
    steps, config = prepared.steps, setup.config
    seconds = [step.seconds for step in timed]
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    total = sum(seconds)
    device = setup.mesh.devices.flat[0]
    peak = peak_flops(device.device_kind, config.compute_dtype)
    available = None if peak is None else total * setup.mesh.size * peak
    programs = [steps.programs.of(batch) for batch in steps.batches.shapes()]
    attention = sorted(frozenset[str]().union(*(compiled_attention(program.as_text()) for program in programs)))
    lengths = {int(batch.gather.shape[-1]) for batch in steps.batches.shapes()}
    return {
        "mesh": dict(setup.mesh.shape),
        "global_batch_size": config.global_batch_size,
        "remat": steps.fit.remat,
        "max_tokens_per_device": steps.fit.max_tokens_per_device,
        "num_steps": len(timed),
        "step_seconds": {"low": low, "median": median, "high": high, "all": seconds},
        "tokens_per_second": sum(step.num_tokens for step in timed) / total,
        "pairs_per_second": config.global_batch_size * len(timed) / total,
        "model_tflops_per_second": sum(step.logical for step in timed) / total / setup.mesh.size / 1e12,
        "mfu": None if available is None else sum(step.logical for step in timed) / available,
        "mfu_executed": None if available is None else sum(step.executed for step in timed) / available,
        "padding": 1 - sum(step.real_slots for step in timed) / sum(step.num_slots for step in timed),
        "peak_bytes": max((_peak(local) for local in jax.local_devices()), default=0) or None,
        "reckoned_bytes": int(max(map(program_bytes, programs))),
        "limit_bytes": memory_limit(),
        "num_programs": len(programs),
        "seconds_to_fit": prepared.seconds_to_fit,
        "seconds_to_compile_others": prepared.seconds_to_compile,
        "attention": attention,
        "attention_expected": sorted({steps.assembly.attention(length) for length in lengths}),
        "losses": [float(np.float32(loss)) for loss in losses],
        "log": prepared.log,
    }


def _peak(device: Any) -> int:
    return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
