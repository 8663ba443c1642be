"""How much of a packed step is padding, by pairs per device: planned on real lengths, nothing is trained.

    python benchmarks/padding_by_batch.py [--shards 8 64] [--steps 300] [--out FILE]

For each table of lengths, the steps of random rows are planned as a run plans them. Shares of the slots without a
token, over all steps:

- bound: if every step had as many slots per device as the longest pair, or the mean over the devices, whichever is
  more. No division of pairs over devices has less.
- fullest: with the slots of the fullest device of each step.
- shapes: with the shape that the step has, of the few that are compiled for the run; what the run computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import machine_line
from speed_data import fitted, read_lengths

from jdpo.data.batching.packing_plan import ItemSizes, pair_sizes, plan_run

TABLES = {"hh": 1024, "long_pairs": 2048}
"""Tables of `lengths/` and the max_length that their rows are cut to."""

TITLES = {"hh": "HH", "long_pairs": "demo rows"}


class Shares(NamedTuple):
    """Shares of padding of a run, the number of its shapes, and the CPU milliseconds of planning one step."""

    bound: float
    fullest: float
    shapes: float
    num_shapes: int
    milliseconds: float


def measure(sizes: ItemSizes, *, per_shard: int, num_shards: int, num_steps: int, max_tokens: int) -> Shares:
    """Plans steps of random rows of a table."""
    rng = np.random.default_rng(0)
    # Drawn with replacement, since the tables are smaller than an epoch.
    steps = [rng.integers(0, len(sizes.slots), per_shard * num_shards) for _ in range(num_steps)]
    started = time.process_time()
    # As on TPUs and CPUs: attention rows hold as many sequences as fit.
    plan = plan_run(
        sizes, steps, num_shards=num_shards, max_tokens_per_device=max_tokens, sequences_per_row=None, max_shapes=8
    )
    seconds = time.process_time() - started
    real = bound = fullest = planned = 0
    for indices in steps:
        slots = sizes.slots[indices]
        bins, needed = plan.needs(indices)
        parts = bins.num_micro * num_shards
        shape = plan.step(indices).shape
        real += int(slots.sum())
        bound += parts * max(int(slots.max()), -(-int(slots.sum()) // parts))
        fullest += parts * needed.num_slots
        planned += shape.num_micro * shape.num_rows * shape.num_slots
    shares = (1 - real / slots for slots in (bound, fullest, planned))
    return Shares(*shares, len(plan.shapes), 1000 * seconds / num_steps)


def report(arguments: argparse.Namespace) -> str:
    """Returns the tables as Markdown."""
    lines = [
        f"`python benchmarks/padding_by_batch.py`, {machine_line(('numpy',))}. Planned, nothing was trained: "
        f"{arguments.steps} steps of random rows, at most {arguments.tokens:,} slots per device at once.",
        "",
        "| rows | devices | pairs per device | bound | fullest device | shapes | programs | CPU ms to plan a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for table, max_length in TABLES.items():
        lengths = read_lengths(table)
        sizes = pair_sizes(fitted(lengths[lengths[:, 0] < max_length], max_length))
        for num_shards in arguments.shards:
            for per_shard in arguments.pairs:
                found = measure(
                    sizes,
                    per_shard=per_shard,
                    num_shards=num_shards,
                    num_steps=arguments.steps,
                    max_tokens=arguments.tokens,
                )
                shares = " | ".join(f"{100 * share:.1f} %" for share in found[:3])
                lines.append(
                    f"| {TITLES[table]} | {num_shards} | {per_shard} | {shares} | {found.num_shapes} "
                    f"| {found.milliseconds:.2f} |"
                )
    return "\n".join(lines) + "\n"


def print_report(
    report: Callable[[argparse.Namespace], str],
    description: str | None,
    *,
    shards: list[int],
    pairs: list[int],
    steps: int,
) -> None:
    """Parses the command line, and prints the report of plans of these sizes; the sizes given here are the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=shards, help="devices that split a batch")
    parser.add_argument("--pairs", type=int, nargs="+", default=pairs, help="pairs per device")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tokens", type=int, default=32768, help="slots per device at once at most")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    arguments = parser.parse_args()
    text = report(arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print_report(report, __doc__, shards=[8, 64], pairs=[2, 4, 8, 16], steps=300)
