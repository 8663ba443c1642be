"""Claim: what `jdpo plan` says of GPUs by formula, without a compiler, is near what their compiled steps need and cost.

    python benchmarks/plan_by_formula.py [CONFIG:TARGET ...]

Compiles the step that a plan takes on each GPU, as `jdpo plan` does where jax[cuda13] is installed, and prints the
formulas' figures of the same step next to it. Nothing runs: the times of both are bounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aot import read_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PROGRAMS = (
    "llama_3_1_8b_tpu:h100x8",
    "llama_3_1_8b_tpu:h100x16",
    "llama_3_1_8b_lora:h100",
    "llama_3_1_8b_lora:h200",
    "qwen2_5_1_5b:h200",
    "qwen2_5_1_5b:h100x8",
)
LENGTHS = [(256, 384, 384)]


def main() -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("programs", nargs="*", default=PROGRAMS, metavar="CONFIG:TARGET")
    options = made.parse_args()
    print("| program | remat | tokens | figure | formula | compiled | formula / compiled |")
    print("|---|---|---:|---|---:|---:|---:|")
    for program in options.programs:
        for line in rows_of(program):
            print(line, flush=True)
    return 0


def rows_of(program: str) -> list[str]:
    """Returns the rows of a program in the table."""
    from jdpo.planning.compile_only import compile_only_devices
    from jdpo.planning.compiled_step import compiling_on
    from jdpo.planning.machines import machine_of
    from jdpo.planning.plan_target import step_limit
    from jdpo.planning.planner.memory_kinds import compiled_memory, estimated_memory
    from jdpo.planning.planner.planned_run import planned_run
    from jdpo.planning.planner.step_costs import compiled_costs, estimated_costs
    from jdpo.planning.planner.step_search import search_step
    from jdpo.training.setup.numerics import numerics, resolve_dtype

    name, _, target = program.partition(":")
    machine = machine_of(target)
    config = read_config(CONFIGS / f"{name}.yaml", [], None)
    devices = compile_only_devices(machine)
    with compiling_on(machine):
        resolved = resolve_dtype(config)
        with numerics(resolved):
            run = planned_run(resolved, devices, LENGTHS)
            search = search_step(run, limit=step_limit(machine), compiles=True, log=lambda _: None)
            chosen, planned = search.chosen, search.chosen.planned
            assert chosen.compilation is not None
            kinds = (
                estimated_memory(planned, search.estimate),
                compiled_memory(planned, chosen.compilation, chosen.needed),
            )
            costs = estimated_costs(machine, planned, search.estimate), compiled_costs(machine, chosen)
    gib = 2.0**30
    figures = [("memory, GiB", kinds[0].total / gib, kinds[1].total / gib)]
    figures += [
        (f"{field.name}, GiB", getattr(kinds[0], field.name) / gib, getattr(kinds[1], field.name) / gib)
        for field in dataclasses.fields(kinds[0])
    ]
    figures.append(("sent within a node, GiB", costs[0].wire_inside / gib, costs[1].wire_inside / gib))
    figures.append(("sent between nodes, GiB", costs[0].wire_across / gib, costs[1].wire_across / gib))
    figures.append(("fastest step, s", costs[0].seconds[0], costs[1].seconds[0]))
    head = f"{planned.assembly.setup.config.model_name_or_path.split('/')[-1]}, {name}, {target}"
    return [
        f"| {head} | {chosen.remat} | {chosen.budget:,} | {what} | {formula:.2f} | {compiled:.2f} "
        f"| {f'{formula / compiled:.2f}' if compiled > 0.005 else ''} |"
        for what, formula, compiled in figures
        if max(formula, compiled) > 0.005
    ]


if __name__ == "__main__":
    sys.exit(main())
