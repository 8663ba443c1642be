"""An ablation ladder: the gain of each of jdpo's optimizations, measured and predicted, and step time over tokens.

    python benchmarks/ladder.py [--tables long_pairs hh] [--vocab_size 32000] [--rounds 5] [--report PATH]

Each rung adds one thing to the one before: padded -> packed -> shared prompt -> chunked head -> cached reference ->
attention. Measured is loss and gradients of one step, jitted, in float32, without the update; all rungs are compiled
first and then run in turns in this process, so that load on the machine affects all equally. They must give the same
loss and gradient norm. The rows are random words of real lengths, evenly spaced in the table by length; the policy is
random and the reference is another random model, so that an equal loss is evidence.

`padded` is `packing: false`, the last three are what `jdpo dpo` runs (with `attention: xla` except for the last); the
two between are built here from the same parts: each side packed as a row of its own with its prompt, and the head as
one product over all slots. Activations are kept (`remat: none`) in all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ladder_flops import RUNGS, predicted_flops
from ladder_rungs import Step, rungs, steps_of_growing_size
from machine import machine_line
from speed_data import fitted, read_lengths, select
from speed_model import LLAMA_22M, ModelShape, tiny
from timing import in_turns, quartiles

from jdpo.config import MeshConfig
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import LOGICAL_RULES

ROOT = Path(__file__).resolve().parents[1]
TABLES = {"long_pairs": (4, 1024), "hh": (8, 512)}
"""Pairs per step and max_length of each table."""

TOLERANCE = 1e-4
GROWTH = (1, 2, 4, 8)


def main() -> None:
    """Climbs the ladder for every table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--vocab_size", type=int, default=LLAMA_22M.vocab_size)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model and short rows, to see that it works")
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/DATE-ladder.md")
    arguments = parser.parse_args()
    shape = tiny(LLAMA_22M) if arguments.tiny else dataclasses.replace(LLAMA_22M, vocab_size=arguments.vocab_size)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    lines = head(arguments, shape)
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        for table in arguments.tables:
            batch, max_length = (2, 64) if arguments.tiny else TABLES[table]
            lengths = fitted(rows_of(table, batch, max_length), max_length)
            lines += climb(shape, table, lengths, arguments.rounds, mesh)
        batch, max_length = (2, 64) if arguments.tiny else TABLES["hh"]
        lengths = fitted(rows_of("hh", batch * GROWTH[-1], max_length), max_length)
        lines += grow(shape, lengths, arguments.rounds, mesh)
    report = arguments.report or ROOT / "benchmarks/results" / f"{date.today()}-ladder.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def head(arguments: argparse.Namespace, shape: ModelShape) -> list[str]:
    return [
        f"# What each means gains, {date.today()}",
        "",
        f"{machine_line()}, on {jax.devices()[0].device_kind}. Llama of width {shape.d_model}, {shape.num_layers} "
        f"layers, V = {shape.vocab_size}: N = {shape.backbone / 1e6:.2f} M, h = {shape.head / 1e6:.2f} M. float32, "
        f"medians of {arguments.rounds} rounds.",
        "",
    ]


def rows_of(table: str, num_rows: int, max_length: int) -> np.ndarray:
    """Returns the lengths of one step's rows, evenly spaced in the table."""
    selection = select(read_lengths(table), batch=num_rows, max_length=max_length, warmup=0, filler=0, steps=1)
    return selection.lengths[selection.measured]


def climb(shape: ModelShape, table: str, lengths: np.ndarray, rounds: int, mesh: Any) -> list[str]:
    """Returns the ladder of one table as Markdown.

    Raises:
      ValueError: a rung gives another loss or gradient norm than the first.
    """
    steps = rungs(shape, lengths, mesh)
    programs = {name: program(step) for name, step in steps.items()}
    check_equal({name: run() for name, run in programs.items()})
    seconds = in_turns(programs, rounds)
    apart, shared = ((steps[name].rows, steps[name].places) for name in ("packed", "shared prompt"))
    flops = predicted_flops(shape, lengths, padded=steps["padded"].places, apart=apart, shared=shared)
    lines = [
        f"## {table}: {len(lengths)} pairs, {int(lengths.sum())} tokens",
        "",
        "| rung | ms, median (quartiles) | gain measured | gain predicted | in all measured | in all predicted "
        "| GFLOP predicted | GFLOP/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    before = first = RUNGS[0]
    for name in RUNGS:
        low, middle, high = quartiles(seconds[name])
        gains = [statistics.median(seconds[other]) / middle for other in (before, first)]
        predicted = [flops[other] / flops[name] for other in (before, first)]
        lines.append(
            f"| {name} | {middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f}) "
            f"| {gains[0]:.2f} | {predicted[0]:.2f} | {gains[1]:.2f} | {predicted[1]:.2f} "
            f"| {flops[name] / 1e9:.1f} | {flops[name] / middle / 1e9:.0f} |"
        )
        before = name
    return [*lines, ""]


def grow(shape: ModelShape, lengths: np.ndarray, rounds: int, mesh: Any) -> list[str]:
    """Returns step times for 1 to 8 times as many tokens, as Markdown."""
    steps = steps_of_growing_size(shape, lengths, GROWTH, mesh)
    seconds = in_turns({step.tokens: program(step) for step in steps}, rounds)
    lines = [
        "## Step time over tokens: HH, everything on, cached reference",
        "",
        "| tokens | times | ms, median (quartiles) | times | microseconds per token |",
        "|---:|---:|---:|---:|---:|",
    ]
    first = steps[0].tokens
    for tokens, taken in seconds.items():
        low, middle, high = quartiles(taken)
        lines.append(
            f"| {tokens} | {tokens / first:.2f} | {middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f}) "
            f"| {middle / statistics.median(seconds[first]):.2f} | {middle / tokens * 1e6:.0f} |"
        )
    return [*lines, ""]


def program(step: Step) -> Callable[[], tuple[float, float]]:
    """Compiles a step; running it waits for the end and returns loss and gradient norm."""

    @jax.jit
    def whole(*operands: Any) -> Any:
        loss, grads = step.function(*operands)
        return loss, optax.tree.norm(grads), grads

    compiled = whole.lower(*step.operands).compile()

    def run() -> tuple[float, float]:
        loss, norm, _ = jax.block_until_ready(compiled(*step.operands))
        return float(loss), float(norm)

    return run


def check_equal(found: dict[str, tuple[float, float]]) -> None:
    expected = found[RUNGS[0]]
    for name, values in found.items():
        if not np.allclose(values, expected, rtol=TOLERANCE):
            raise ValueError(f"{name} gives loss and gradient norm {values}, {RUNGS[0]} {expected}")
    assert abs(expected[0] - float(jnp.log(2.0))) > TOLERANCE, expected


if __name__ == "__main__":
    main()
