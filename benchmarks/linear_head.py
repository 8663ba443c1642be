"""The chunked LM head against all logits at once: time and temporary memory of value and gradients.

    python benchmarks/linear_head.py [--tokens N] [--width D] [--vocab V] [--dtype NAME] [--chunk-size C ...]

Random hidden states [4, tokens / 4, width], head and targets; both versions compiled ahead of time and run in turns,
median of the rounds after the first. The chunked version computes the logits twice (8 products of the head's size a
token against 6). Held against the bars only at the default sizes: exit code 1 where it lies past one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.losses.linear import linear_token_logps
from jdpo.losses.logprobs import token_logps

DEFAULTS = {"tokens": 4096, "width": 512, "vocab": 32000, "dtype": "float32"}
TIME_BAR = 1.25
"""Most time of the chunked version, over that of the plain one."""
MEMORY_BAR = 5.0
"""Least temporary memory of the plain version, over that of the chunked one."""
NUM_ROWS = 4


def plain(hidden: Any, head: Any, targets: Any) -> Any:
    """All logits at once."""
    return token_logps(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), targets)


def inputs(tokens: int, width: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    """Hidden states, head, targets and a random cotangent."""
    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, tokens // NUM_ROWS)
    hidden = jnp.asarray(rng.normal(0, 1, (*shape, width)), dtype)
    head = jnp.asarray(rng.normal(0, width**-0.5, (width, vocab)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, shape)), jnp.asarray(rng.normal(0, 1, shape), jnp.float32)


def compiled(function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """Value and gradients with respect to hidden states and head, ahead of time."""

    def loss(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        return (function(hidden, head, targets) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()


def seconds(programs: dict[str, Any], arrays: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Median time of each program; a round runs each of them once, so that load on the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in times.items()}


def main() -> int:
    """Print the table; exit code 1 where the default chunk lies past a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--chunk-size", type=int, nargs="*", default=[], help="further chunk sizes, positions of a row")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in DEFAULTS}
    arrays = inputs(**sizes)
    versions = {"all logits": plain, "chunked": linear_token_logps}
    versions |= {f"chunked by {size}": partial(linear_token_logps, chunk_size=size) for size in arguments.chunk_size}
    programs = {name: compiled(version, arrays) for name, version in versions.items()}
    times = seconds(programs, arrays, arguments.rounds)
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}

    print(", ".join(f"{name} {value}" for name, value in sizes.items()), "on", jax.devices()[0].device_kind)
    print("\n| head | time (s) | of the plain time | temporary memory (MiB) | times less |\n|---|---|---|---|---|")
    slower = {name: times[name] / times["all logits"] for name in versions}
    smaller = {name: memory["all logits"] / memory[name] for name in versions}
    for name in versions:
        figures = f"{times[name]:.3f} | {slower[name]:.2f} | {memory[name] / 2**20:.0f} | {smaller[name]:.1f}"
        print(f"| {name} | {figures} |")
    print(f"\nBars: time at most {TIME_BAR} of the plain version's, temporary memory {MEMORY_BAR} times less.")
    past = sizes == DEFAULTS and (slower["chunked"] > TIME_BAR or smaller["chunked"] < MEMORY_BAR)
    return int(past)


if __name__ == "__main__":
    sys.exit(main())
