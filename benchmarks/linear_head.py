"""The chunked LM head against all logits at once: time and temporary memory of value and gradients.

    python benchmarks/linear_head.py [--tokens N] [--width D] [--vocab V] [--dtype NAME] [--chunk-size C ...]

Random hidden states [4, tokens / 4, width], head and targets; all versions compiled ahead of time and run in turns,
median of the rounds after the first. The chunked version computes the logits twice (8 products of the head's size per
token against 6). Training passes `lengths`, so that the number of chunks is known only as the program runs: two arms
do so, with all positions of a row real and with half of them. The bars apply only at the default sizes; the exit code
is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine_line
from timing import in_turns

from jdpo.losses.linear import linear_token_logps
from jdpo.losses.logprobs import token_logps

DEFAULTS = {"tokens": 4096, "width": 512, "vocab": 32000, "dtype": "float32"}
TIME_BAR = 1.25
"""Most time of the chunked version, over that of the plain one."""
MEMORY_BAR = 5.0
"""Least temporary memory of the plain version, over that of the chunked one."""
BARRED = ("chunked", "chunked, all positions real")
NUM_ROWS = 4


def plain(hidden: Any, head: Any, targets: Any, lengths: Any) -> Any:
    """Computes all logits at once."""
    del lengths
    return token_logps(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), targets)


def chunked(hidden: Any, head: Any, targets: Any, lengths: Any, *, chunk_size: int | None = None) -> Any:
    """Computes all chunks, one after the other."""
    del lengths
    return linear_token_logps(hidden, head, targets, chunk_size=chunk_size)


def chunked_by_length(hidden: Any, head: Any, targets: Any, lengths: Any) -> Any:
    """Computes the chunks up to the last real position, as training does."""
    return linear_token_logps(hidden, head, targets, lengths=lengths)


def inputs(tokens: int, width: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    """Returns hidden states, head, targets and a random cotangent."""
    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, tokens // NUM_ROWS)
    hidden = jnp.asarray(rng.normal(0, 1, (*shape, width)), dtype)
    head = jnp.asarray(rng.normal(0, width**-0.5, (width, vocab)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, shape)), jnp.asarray(rng.normal(0, 1, shape), jnp.float32)


def real_positions(tokens: int, share: float) -> Any:
    """Returns the number of real positions of each row, int [r]."""
    return jnp.full(NUM_ROWS, int(tokens // NUM_ROWS * share), jnp.int32)


def compiled(function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """Compiles value and gradients with respect to hidden states and head."""

    def loss(hidden: Any, head: Any, targets: Any, weights: Any, lengths: Any) -> Any:
        return (function(hidden, head, targets, lengths) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()


def main() -> int:
    """Prints the table; the exit code is 1 if the default chunk misses a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--chunk-size", type=int, nargs="*", default=[], help="further chunk sizes, positions of a row")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in DEFAULTS}
    arrays = inputs(**sizes)
    whole, half = (real_positions(arguments.tokens, share) for share in (1, 0.5))
    versions: dict[str, tuple[Callable[..., Any], Any]] = {
        "all logits": (plain, whole),
        "chunked": (chunked, whole),
        "chunked, all positions real": (chunked_by_length, whole),
        "chunked, half of them real": (chunked_by_length, half),
    }
    versions |= {f"chunked by {size}": (partial(chunked, chunk_size=size), whole) for size in arguments.chunk_size}
    programs = {name: compiled(version, (*arrays, lengths)) for name, (version, lengths) in versions.items()}
    steps = {
        name: lambda name=name, lengths=lengths: jax.block_until_ready(programs[name](*arrays, lengths))
        for name, (_, lengths) in versions.items()
    }
    times = {name: median(taken) for name, taken in in_turns(steps, arguments.rounds).items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    past = report(sizes, times, memory)
    return int(sizes == DEFAULTS and past)


def report(sizes: dict[str, Any], times: dict[str, float], memory: dict[str, int]) -> bool:
    """Prints the table and returns whether a chunked version misses a bar."""
    print(f"{machine_line(('jax',))}\n")
    print(", ".join(f"{name} {value}" for name, value in sizes.items()), "on", jax.devices()[0].device_kind)
    print("\n| head | time (s) | of the plain time | temporary memory (MiB) | times less |\n|---|---|---|---|---|")
    slower = {name: times[name] / times["all logits"] for name in times}
    smaller = {name: memory["all logits"] / memory[name] for name in times}
    for name in times:
        figures = f"{times[name]:.3f} | {slower[name]:.2f} | {memory[name] / 2**20:.0f} | {smaller[name]:.1f}"
        print(f"| {name} | {figures} |")
    print(f"\nBars: time at most {TIME_BAR} of the plain version's, temporary memory {MEMORY_BAR} times less.")
    return any(slower[name] > TIME_BAR or smaller[name] < MEMORY_BAR for name in BARRED)


if __name__ == "__main__":
    sys.exit(main())
