"""Attention backends: time, temporary memory and error of value and gradients, next to torch's where it is installed.

    python benchmarks/attention.py [--lengths T ...] [--dtype NAME] [--backends NAME ...] [--ragged] [--window W]
    python benchmarks/attention.py --pairs benchmarks/lengths/hh.csv [--max-length T] [--batch B] [--blocks S ...]

Random queries, keys, values and cotangents; programs are compiled ahead of time and run in turns, so that load on the
machine affects all equally. Reported are medians and quartiles of the rounds after the first. The error is the largest
norm-wise distance of output and gradients from the plain path in float64, over sequences' real positions.
With --ragged, lengths are uniform between a quarter and the whole of t; torch gets a causal mask without lengths.

With --pairs, sequences have the lengths of real pairs (prompt and chosen, prompt and rejected), and rows are as long as
the longest of a batch: one sequence per row, several back to back, and these in tiles of other sizes. CPU ms are of
all cores together.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turns, quartiles

from jdpo.models.attention import causal_attention, compiled_attention


def inputs(args: argparse.Namespace, length: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Returns query, key, value and cotangent [n, t, .., k] in float64, and lengths."""
    rng = np.random.default_rng(0)
    n, h, g, k = args.sequences, args.heads, args.kv_heads, args.head_dim
    lengths = rng.integers(length // 4, length + 1, n) if args.ragged else np.full(n, length)
    lengths[0] = length
    query, key, value, cotangent = (rng.normal(size=(n, length, heads, k)) for heads in (h, g, g, h))
    real = np.arange(length) < lengths[:, None]
    return (query, key, value, cotangent * real[..., None, None]), lengths.astype(np.int32)


def pair_rows(args: argparse.Namespace, start: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns t, lengths [n] of a batch of real pairs, and lengths [n', u] of the same sequences back to back."""
    table = np.loadtxt(args.pairs, int, delimiter=",", skiprows=1)[start : start + args.batch]
    sizes = np.minimum((table[:, :1] + table[:, 1:]).reshape(-1), args.max_length)
    length, rows = -(-int(sizes.max()) // 16) * 16, []
    for size in np.sort(sizes)[::-1]:  # the longest first, each into the first row with room
        row = next((row for row in rows if sum(row) + size <= length), None)
        rows.append([size]) if row is None else row.append(size)
    packed = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        packed[index, : len(row)] = row
    return length, sizes.astype(np.int32), packed


def pair_table(args: argparse.Namespace, start: int) -> list[str]:
    """Times one batch of pairs in all arrangements."""
    length, alone, packed = pair_rows(args, start)
    rng = np.random.default_rng(0)

    def arrangement(lengths: np.ndarray, block: int | None) -> Callable[[], Any]:
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        arrays = [rng.normal(size=(len(lengths), length, h, args.head_dim)).astype(args.dtype) for h in heads]
        arrays[3] *= (np.arange(length) < lengths.reshape(len(lengths), -1).sum(1)[:, None])[..., None, None]
        compiled = program("blockwise", args.window, tuple(arrays), lengths, block)
        return lambda: jax.block_until_ready(compiled(*arrays, lengths))

    arms = {"one per row": arrangement(alone, None), "back to back": arrangement(packed, None)}
    arms |= {f"back to back, tiles of {block}": arrangement(packed, block) for block in args.blocks}
    processor: dict[str, list[float]] = {name: [] for name in arms}

    def timed(name: str) -> None:
        began = time.process_time()
        arms[name]()
        processor[name].append(time.process_time() - began)

    wall = in_turns({name: lambda name=name: timed(name) for name in arms}, args.rounds)
    base = statistics.median(wall["one per row"]), statistics.median(processor["one per row"][1:])
    table = []
    for name, taken in wall.items():
        low, middle, high = quartiles(taken)
        used = statistics.median(processor[name][1:])
        places = (len(alone) if name == "one per row" else len(packed)) * length
        table.append(
            f"| {start} | {name} | {length} | {places / alone.sum():.2f} | {middle * 1e3:.1f} ({low * 1e3:.1f} to "
            f"{high * 1e3:.1f}) | {base[0] / middle:.2f} | {used * 1e3:.1f} | {base[1] / used:.2f} |"
        )
    return table


def program(backend: str, window: int | None, arrays: tuple[Any, ...], lengths: Any, block: int | None = None) -> Any:
    """Compiles output and gradients; fails if the program holds another backend than requested."""

    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        def attend(*operands: Any) -> Any:
            return causal_attention(*operands, lengths=lengths, backend=backend, window=window, block_q=block)

        output, pullback = jax.vjp(attend, query, key, value)
        real = jnp.arange(output.shape[1]) < lengths.reshape(len(lengths), -1).sum(1)[:, None]
        return jnp.where(real[..., None, None], output, 0), *pullback(cotangent)

    compiled = jax.jit(step).lower(*arrays, lengths).compile()
    found = compiled_attention(compiled.as_text())
    assert found == {backend}, (backend, found)
    return compiled


def torch_step(arrays: tuple[np.ndarray, ...], dtype: str) -> Callable[[], Any]:
    """Runs torch's scaled_dot_product_attention in its own layout [n, h, t, k]."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.tensor(x, dtype=getattr(torch, dtype), device=device).transpose(1, 2).contiguous() for x in arrays]

    def step() -> Any:
        operands = [x.detach().requires_grad_() for x in tensors[:3]]
        output = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=True)
        output.backward(tensors[3])
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    return step


def errors(programs: dict[str, Any], arrays: tuple[Any, ...], exact: tuple[Any, ...], lengths: Any) -> dict[str, float]:
    def distance(found: Any, wanted: Any) -> float:
        return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))

    return {
        name: max(distance(*pair) for pair in zip(compiled(*arrays, lengths), exact, strict=True))
        for name, compiled in programs.items()
    }


def rows(args: argparse.Namespace, length: int) -> list[str]:
    exact_arrays, lengths = inputs(args, length)
    arrays = tuple(jnp.asarray(x, args.dtype) for x in exact_arrays)
    programs = {name: program(name, args.window, arrays, lengths) for name in args.backends}
    with jax.enable_x64(True):
        double = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        exact = tuple(np.asarray(x) for x in program("xla", args.window, double, lengths)(*double, lengths))
    error = errors(programs, arrays, exact, lengths)
    memory = {name: f"{p.memory_analysis().temp_size_in_bytes / 2**20:.0f}" for name, p in programs.items()}
    steps: dict[str, Callable[[], Any]] = {
        name: lambda compiled=compiled: jax.block_until_ready(compiled(*arrays, lengths))
        for name, compiled in programs.items()
    }
    if importlib.util.find_spec("torch") and args.window is None:
        steps["torch"] = torch_step(exact_arrays, args.dtype)
    seconds = {name: quartiles(taken) for name, taken in in_turns(steps, args.rounds).items()}
    base = seconds[args.backends[0]][1]
    table = []
    for name, (low, middle, high) in seconds.items():
        spread = f"{middle * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})"
        accuracy = f"{error[name]:.1e}" if name in error else ""
        table.append(f"| {length} | {name} | {spread} | {base / middle:.2f} | {memory.get(name, '')} | {accuracy} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="+", default=["xla", "blockwise"], help="the first is the measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=Path, help="table of lengths of pairs, for rows of several sequences")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="pairs at once")
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 100, 200], help="first pair of each batch")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="tile sizes to compare")
    args = parser.parse_args()
    shape = f"{args.sequences} sequences, {args.heads} heads, {args.kv_heads} key heads of {args.head_dim}"
    if args.pairs:
        shape = f"{args.batch} pairs of {args.pairs.name}, {args.heads} heads, {args.kv_heads} key heads"
        print(f"{shape} of {args.head_dim}, {args.dtype}, output and gradients, on {jax.devices()[0].device_kind}\n")
        print("| first pair | rows | t | places per token | ms (quartiles) | times faster | CPU ms | times less |")
        print(f"|{'---|' * 8}")
        for start in args.starts:
            print("\n".join(pair_table(args, start)), flush=True)
        return
    print(f"{shape}, {args.dtype}, window {args.window}, ragged {args.ragged}, on {jax.devices()[0].device_kind}\n")
    print(f"| t | backend | ms (quartiles) | times faster than {args.backends[0]} | temporary memory (MiB) | error |")
    print("|---|---|---|---|---|---|")
    for length in args.lengths:
        print("\n".join(rows(args, length)), flush=True)


if __name__ == "__main__":
    main()
