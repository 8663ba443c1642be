"""Plans a run on a machine that does not have to be here: will it fit, how, how fast, and what limits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jdpo.chips import GPU_POOL
from jdpo.config import TrainConfig
from jdpo.planning.compile_only import compile_only_devices, missing_package, on_nodes
from jdpo.planning.compiled_step import compiling_on
from jdpo.planning.machines import Machine
from jdpo.planning.planner.absent_devices import absent_devices, without_compiler_options
from jdpo.planning.planner.memory_kinds import compiled_memory, estimated_memory
from jdpo.planning.planner.plan_cache import plan_key, read_plan, write_plan
from jdpo.planning.planner.planned_run import PlannedRun, planned_run
from jdpo.planning.planner.step_costs import StepCosts, compiled_costs, estimated_costs
from jdpo.planning.planner.step_search import Search, search_step
from jdpo.planning.planner.suggestions import suggestions_if_missing, suggestions_if_wasteful
from jdpo.planning.target_plan import MemoryByKind, TargetPlan
from jdpo.training.fit.memory_fit import SHARES
from jdpo.training.setup.numerics import numerics, resolve_dtype

FOLDER = "plans"
"""Folder in the cache for plans that were made before."""

_DOES_NOT_FIT = "Nothing: the step does not fit."


def plan_target(
    config: TrainConfig,
    machine: Machine,
    lengths: Sequence[Sequence[int]],
    *,
    cache_dir: str | Path,
    log: Callable[[str], None],
) -> TargetPlan:
    """Plans a run on a machine, or returns the plan that was made before with the same settings and versions.

    The mesh is the one that a run would have (`planner.planned_run.choose_mesh`), and so are remat and the tokens at
    once: the fastest by estimate whose compiled step fits. Steps for TPUs are compiled, at most three; a run fits only
    if one of them did. Steps for GPUs are compiled where `jax[cuda13]` is installed, and else estimated by formula.

    A compiler that crashes ends the process, so callers that plan several targets use a process for each.

    Args:
      config: of `jdpo dpo` or `jdpo sft`; `model_name_or_path` is a folder with config.json.
      lengths: of each row, the tokens of prompt, chosen and rejected, or of a supervised row.
      cache_dir: folder of jdpo's caches.
      log: takes lines on progress.

    Returns:
      The plan; one that does not fit is a plan with `fits` False.

    Raises:
      ValueError: settings that do not fit each other or the devices, or no compiler for TPUs.
      OSError: the cache cannot be written.
    """
    if not (Path(config.model_name_or_path) / "config.json").is_file():
        raise ValueError(f"model_name_or_path {config.model_name_or_path}: expected a folder with a config.json")
    folder = Path(cache_dir).expanduser() / FOLDER
    key = plan_key(config, machine, lengths)
    kept = read_plan(folder, key)
    if kept is not None:
        return dataclasses.replace(kept, from_cache=True)
    plan = _plan(config, machine, lengths, log)
    write_plan(folder, key, plan)
    return plan


def _plan(
    config: TrainConfig, machine: Machine, lengths: Sequence[Sequence[int]], log: Callable[[str], None]
) -> TargetPlan:
    missing = missing_package(machine)
    compiles = missing is None or not machine.is_gpu
    if not compiles:
        log(f"{missing} is not installed: memory and time are estimated by formula")
    devices = compile_only_devices(machine) if compiles else absent_devices(machine)
    limit = step_limit(machine)
    with compiling_on(machine):
        config = dataclasses.replace(config, mesh=on_nodes(config.mesh, machine))
        resolved = resolve_dtype(config if compiles else without_compiler_options(config))
        with numerics(resolved):
            run = planned_run(resolved, devices, lengths)
            search = search_step(run, limit=limit, compiles=compiles, log=log)
            costs = _costs(machine, search)
            return _described(run, search, costs, machine, devices, lengths, limit)


def step_limit(machine: Machine) -> float:
    """Returns the bytes that a run lets a step take of a device's memory, as `memory_limit` does on such a device."""
    platform = machine.target.platform
    return machine.chip.hbm_bytes * SHARES[platform] * (GPU_POOL if platform == "gpu" else 1.0)


def _costs(machine: Machine, search: Search) -> StepCosts | None:
    chosen = search.chosen
    if not search.fits:
        return None
    if chosen.compilation is None:
        return estimated_costs(machine, chosen.planned, search.estimate)
    return compiled_costs(machine, chosen)


def _memory(search: Search) -> MemoryByKind:
    chosen, compilation = search.chosen, search.chosen.compilation
    if compilation is not None and (compilation.program or compilation.reported_bytes):
        return compiled_memory(chosen.planned, compilation, chosen.needed)
    return estimated_memory(chosen.planned, search.estimate)


def _described(
    run: PlannedRun,
    search: Search,
    costs: StepCosts | None,
    machine: Machine,
    devices: Sequence[Any],
    lengths: Sequence[Sequence[int]],
    limit: float,
) -> TargetPlan:
    chosen, config, batch = search.chosen, run.config, search.chosen.planned.batch
    kinds, compilation = _memory(search), chosen.compilation
    sizes, num_micro = run.sizes(chosen.budget), int(batch.tokens.shape[0])
    padding = sizes.slots / sizes.tokens
    # The step that was compiled is the largest one; others take as much less as they have fewer slots.
    share = sizes.slots / len(run.steps) / batch.tokens.size
    error = None if compilation is None or compilation.error is None else str(compilation.error)
    if costs is None:
        advice = suggestions_if_missing(run, search, devices, lengths, limit)
    else:
        advice = suggestions_if_wasteful(run, padding, costs, machine)
    return TargetPlan(
        target=machine.name,
        device_kind=machine.kind,
        num_devices=machine.num_devices,
        num_hosts=machine.num_hosts,
        num_slices=machine.slices,
        fits=search.fits,
        missing_bytes=0 if search.fits else max(round(kinds.total - limit), 1),
        how="estimated" if compilation is None else "compiled",
        error=error,
        mesh=dict(run.assembly.setup.mesh.shape),
        max_tokens_per_device=chosen.budget,
        remat=chosen.remat,
        optimizer=config.optimizer.name,
        pairs_per_micro_batch=config.global_batch_size / num_micro,
        micro_batches=num_micro,
        memory=kinds,
        hbm_bytes=int(machine.chip.hbm_bytes),
        limit_bytes=int(limit),
        wire_inside_bytes=None if costs is None else costs.wire_inside,
        wire_across_bytes=None if costs is None else costs.wire_across,
        padding=padding,
        step_seconds=None if costs is None else (share * costs.seconds[0], share * costs.seconds[1]),
        rests_on=_DOES_NOT_FIT if costs is None else costs.rests_on,
        tokens_per_step=round(sizes.tokens / len(run.steps)),
        mfu=None if costs is None else costs.mfu(machine),
        num_compilations=search.num_compilations,
        from_cache=False,
        suggestions=advice,
    )
