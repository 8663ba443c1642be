"""Claim: of the remat policies, dots takes the least time per token where it fits; none is not worth its memory.

    python benchmarks/remat.py CONFIG --on TARGET --lengths 256,384,384 [--layers N] [key=value ...]

Compiles the step of a config under each policy, as benchmarks/aot.py does with one, and prints a table: peak memory and
time per token by the roofline, next to what the run estimates before it compiles anything
(jdpo/training/fit/estimates.py). Compiled, not run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from aot import lengths_of, read_config, use_code

HEAD = "| policy | peak GiB | estimated GiB | memory traffic GB | us per token | to dots | estimated to dots |"


def main() -> int:
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path)
    made.add_argument("--on", required=True, metavar="TARGET")
    made.add_argument("--lengths", required=True, metavar="P,C,R")
    made.add_argument("--layers", type=int)
    options, words = made.parse_known_args()
    use_code(None)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    from jdpo.models.remat import REMAT_ORDER
    from jdpo.planning.machines import machine_of

    machine, found = machine_of(options.on), {}
    for remat in REMAT_ORDER:
        config = read_config(options.config, [*words, f"remat={remat}"], None)
        found[remat] = measured(machine, config, lengths_of(options.lengths), options.layers)
        print(f"{remat}: {found[remat]}", file=sys.stderr, flush=True)
    print(table(found))
    return 0


def measured(machine: Any, config: Any, lengths: list[tuple[int, ...]], num_layers: int | None) -> dict[str, float]:
    """Compiles a step; returns what the program needs, and what the run estimates."""
    from jdpo.models.remat import REMAT_ORDER
    from jdpo.planning.compiled_step import compile_step_for, compiling_on
    from jdpo.planning.measurement import measure
    from jdpo.training.fit.estimates import estimate_step

    step = compile_step_for(machine, config, lengths, num_layers=num_layers)
    planned, program = step.planned, measure(step)
    with compiling_on(machine):
        estimate = estimate_step(planned.assembly, REMAT_ORDER, planned.batch)
    tokens = planned.tokens_per_device
    return {
        "peak": program["peak_bytes"] / 2**30,
        "estimated": estimate.num_bytes(planned.remat, tokens) / 2**30,
        "traffic": program["memory_traffic_bytes"] / 1e9,
        "time": program["time_ms"]["total"] * 1e3 / tokens,
        "estimated_time": estimate.seconds(planned.remat, tokens) / estimate.seconds("dots", tokens),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Returns the policies as Markdown."""
    lines = [HEAD, "|---" + "|---:" * 6 + "|"]
    for remat, row in found.items():
        relative = row["time"] / found["dots"]["time"]
        lines.append(
            f"| {remat} | {row['peak']:.2f} | {row['estimated']:.2f} | {row['traffic']:.0f} | {row['time']:.1f} "
            f"| {relative:.3f} | {row['estimated_time']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
