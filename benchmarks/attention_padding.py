"""The places of attention for each token of its sequences, by pairs per device: planned on real lengths.

    python benchmarks/attention_padding.py [--shards 1 8 64] [--pairs 2 8 16 32] [--out FILE]

Attention reads a sequence for each side of each pair, 2P + C + R tokens of a pair. For each table of lengths, the steps
of random rows are planned as a run plans them, with the few shapes that are compiled for the run. Places of all
attention rows, divided by the tokens of all sequences:

- one: one sequence per attention row, which is padded to the longest of its shape.
- joined: sequences back to back in attention rows no longer than the longest one.
- places per slot: of the joined rows; without padding it is (2P + C + R) / (P + C + R).

Nothing is trained.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np
from machine import machine_line
from padding_by_batch import TABLES, TITLES, print_report
from speed_data import fitted, read_lengths

from jdpo.data.batching.packing_plan import ItemSizes, pair_sizes, plan_run


class Places(NamedTuple):
    """The places of a run's steps.

    Attributes:
      per_token: places of attention rows per token of the sequences.
      per_slot: places per slot, padding of both included.
      slots: slots per token, each prompt once.
      num_shapes: shapes of the run.
      length: places of an attention row, in the shape with the longest.
      milliseconds: of planning one step.
    """

    per_token: float
    per_slot: float
    slots: float
    num_shapes: int
    length: int
    milliseconds: float


def places_of(
    sizes: ItemSizes, steps: list[np.ndarray], *, num_shards: int, max_tokens: int, sequences_per_row: int | None
) -> Places:
    """Plans steps, and counts the places and slots of their shapes."""
    started = time.process_time()
    plan = plan_run(
        sizes, steps, num_shards=num_shards, max_tokens_per_device=max_tokens, sequences_per_row=sequences_per_row
    )
    seconds = time.process_time() - started
    shapes = [plan.step(indices).shape for indices in steps]
    rows = np.concatenate(steps)
    places = sum(shape.num_places for shape in shapes)
    slots = sum(shape.num_micro * shape.num_rows * shape.num_slots for shape in shapes)
    return Places(
        places / int(sizes.sequences[rows].sum()),
        places / slots,
        slots / int(sizes.slots[rows].sum()),
        len(plan.shapes),
        max(shape.length for shape in plan.shapes),
        1000 * seconds / len(steps),
    )


def random_steps(num_rows: int, step_rows: int, num_steps: int) -> list[np.ndarray]:
    """Returns the rows of steps: passes over a table in random orders, one after the other."""
    rng = np.random.default_rng(0)
    passes = -(-num_steps * step_rows // num_rows)
    order = np.concatenate([rng.permutation(num_rows) for _ in range(passes)])
    return list(order[: num_steps * step_rows].reshape(num_steps, step_rows))


def report(arguments: argparse.Namespace) -> str:
    """Returns the table as Markdown."""
    lines = [
        f"`python benchmarks/attention_padding.py`, {machine_line(('numpy',))}. Planned, nothing was trained: "
        f"{arguments.steps} steps of random rows, at most {arguments.tokens:,} slots per device at once.",
        "",
        "| rows | devices | pairs per device | one | joined | places per slot, one | joined | slots per token, one "
        "| joined | programs, one | joined | ms to plan a step, one | joined |",
        f"|---|{'---:|' * 12}",
    ]
    for table, max_length in TABLES.items():
        lengths = read_lengths(table)
        sizes = pair_sizes(fitted(lengths[lengths[:, 0] < max_length], max_length))
        for num_shards in arguments.shards:
            for per_shard in arguments.pairs:
                steps = random_steps(len(sizes.slots), per_shard * num_shards, arguments.steps)
                one, joined = (
                    places_of(sizes, steps, num_shards=num_shards, max_tokens=arguments.tokens, sequences_per_row=most)
                    for most in (1, None)
                )
                cells = [f"{one.per_token:.2f} | {joined.per_token:.3f}", f"{one.per_slot:.2f} | {joined.per_slot:.2f}"]
                cells += [f"{one.slots:.3f} | {joined.slots:.3f}", f"{one.num_shapes} | {joined.num_shapes}"]
                cells += [f"{one.milliseconds:.2f} | {joined.milliseconds:.2f}"]
                lines.append(f"| {TITLES[table]} | {num_shards} | {per_shard} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_report(report, __doc__, shards=[1, 8, 64], pairs=[2, 8, 16, 32], steps=200)
