"""Claim: from 16 to 256 chips, a chip's activations and bytes on the wire stay as they are, and its weights shrink.

    python benchmarks/scaling.py CONFIG --on v5e-16 v5e-64 v5e-256 [--out FOLDER] [key=value ...]
    python benchmarks/scaling.py --table FOLDER

The first compiles the step of a config for each target, with as many pairs as fill the tokens of its chips, and writes
FOLDER/TARGET.json; a TPU program takes minutes. The second prints their table. Compiled, not run.

Activations are counted by the compiler's list of what is in memory when: at the moment at which they take most, all
values of the forward and the backward pass that are neither weights, gradients nor the head's, the gathered weights of
the layers at work among them (jdpo/planning/planner/memory_kinds.py). The peak of a program is another moment on 16
chips than on 64, so what is in memory there does not compare.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from aot import lengths_of, read_config  # noqa: E402

LENGTHS = "256,384,384"
COLUMNS = ("weights", "moments", "gradients", "activations", "wire inside", "wire across")


def main() -> int:
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path, nargs="?")
    made.add_argument("--on", nargs="+", metavar="TARGET")
    made.add_argument("--out", type=Path, default=Path())
    made.add_argument("--table", type=Path, metavar="FOLDER")
    options, words = made.parse_known_args()
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in options.table.glob("*.json")]))
        return 0
    if options.config is None or not options.on:
        made.error("give CONFIG and --on TARGET ..., or --table FOLDER")
    options.out.mkdir(parents=True, exist_ok=True)
    for target in options.on:
        found = measured(options.config, target, words)
        (options.out / f"{target}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(target, json.dumps(found), flush=True)
    return 0


def measured(path: Path, target: str, words: Sequence[str]) -> dict[str, Any]:
    """Compiles a config's step for a target, and returns what a chip holds and sends."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    from jdpo.planning.compile_only import compile_only_devices
    from jdpo.planning.compiled_step import compile_with_dump, compiled_step, compiling_on
    from jdpo.planning.machines import machine_of
    from jdpo.planning.measurement import measure
    from jdpo.planning.planned_step import plan_step
    from jdpo.training.fit.estimates import local_bytes
    from jdpo.training.setup.numerics import numerics, resolve_dtype

    machine, lengths = machine_of(target), lengths_of(LENGTHS)
    config = read_config(path, [f"global_batch_size={machine.num_devices}", *words], None)
    tokens = config.max_tokens_per_device
    assert tokens is not None, "give max_tokens_per_device"
    pairs = machine.num_devices * (tokens // sum(lengths[0]))
    config = read_config(path, [*words, f"global_batch_size={pairs}"], None)
    with compiling_on(machine):
        config = resolve_dtype(config)
        with numerics(config):
            planned = plan_step(
                config,
                compile_only_devices(machine),
                lengths,
                platform=machine.target.platform,
                memory=machine.chip.hbm_bytes,
            )
            compilation = compile_with_dump(planned.assembly.lower_step(planned.batch))
    if compilation.error is not None:
        raise compilation.error
    step = compiled_step(machine, planned, compilation)
    found, state = measure(step), planned.assembly.state
    across = sum(row["wire_bytes"] for row in found["collectives"] if row["across_slices"])
    return {
        "target": target,
        "chips": machine.num_devices,
        "mesh": found["mesh"],
        "remat": found["remat"],
        "tokens_per_device": found["tokens_per_device"],
        "micro_batches": found["micro_batches"],
        "peak_bytes": found["peak_bytes"],
        "weights": local_bytes(state.params),
        "moments": local_bytes(state.opt_state),
        "gradients": local_bytes(state.params),  # summed in float32, as the weights are kept
        "activations": most_activations(planned, compilation.text, compilation.live_ranges),
        "wire inside": found["wire_bytes"] - across,
        "wire across": across,
        "collectives": found["collectives"],
    }


def most_activations(planned: Any, text: str, live_ranges: str) -> int:
    """Returns the bytes of activations at the moment at which they take most."""
    import jax

    from jdpo.planning.hlo.hlo_text import parse
    from jdpo.planning.planner.memory_kinds import Value, kind_of

    module = parse(text)
    places = {op.name: (computation, op) for computation in module.computations.values() for op in computation.ops}
    weights = frozenset(
        tuple(sorted(size for size in leaf.sharding.shard_shape(leaf.shape) if size > 1))
        for leaf in jax.tree.leaves(planned.assembly.state.params)
    )
    changes: Counter[int] = Counter()
    for name, index, first, last in re.findall(r"^    (\S+?)\{(\d*)\}:(\d+)-(\d+)$", live_ranges, re.MULTILINE):
        computation, op = places.get(name, (None, None))
        if computation is None or op is None or (op.opcode == "parameter" and computation.name == module.entry):
            continue
        # A value of a tuple without an index is the table of its parts.
        array = op.arrays[int(index or 0)] if len(op.arrays) > int(index or 0) else None
        if array is None or array.space or (not index and len(op.arrays) > 1):
            continue
        value = Value(int(array.num_bytes), array, computation.op_name(op), computation.name != module.entry)
        if kind_of(value, weights) == "activations":
            changes[int(first)] += value.num_bytes
            changes[int(last)] -= value.num_bytes
    held = most = 0
    for moment in sorted(changes):
        held += changes[moment]
        most = max(most, held)
    return most


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements as a table in Markdown, GiB of one chip."""
    lines = [f"| chips | mesh | peak | {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (1 + len(COLUMNS))]
    for row in sorted(rows, key=lambda row: (row["chips"], row["target"])):
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        cells = [f"{row[name] / 2**30:.2f}" for name in ("peak_bytes", *COLUMNS)]
        lines.append(f"| {row['target']} | {mesh} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
