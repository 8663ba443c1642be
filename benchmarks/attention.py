"""Attention backends: time, temporary memory and error of value and gradients, next to torch's where it is installed.

    python benchmarks/attention.py [--lengths T ...] [--dtype NAME] [--backends NAME ...] [--ragged] [--window W]

Random queries, keys, values and cotangents; programs are compiled ahead of time and run in turns, so that load on the
machine affects all equally. Reported are medians and quartiles of the rounds after the first. The error is the largest
norm-wise distance of output and gradients from the plain path in float64, over sequences' real positions.
With --ragged, lengths are uniform between a quarter and the whole of t; torch gets a causal mask without lengths.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
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


def program(backend: str, window: int | None, arrays: tuple[Any, ...], lengths: Any) -> Any:
    """Compiles output and gradients; fails if the program holds another backend than requested."""

    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        def attend(*operands: Any) -> Any:
            return causal_attention(*operands, lengths=lengths, backend=backend, window=window)

        output, pullback = jax.vjp(attend, query, key, value)
        real = jnp.arange(output.shape[1]) < lengths[:, None]
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
    args = parser.parse_args()
    shape = f"{args.sequences} sequences, {args.heads} heads, {args.kv_heads} key heads of {args.head_dim}"
    print(f"{shape}, {args.dtype}, window {args.window}, ragged {args.ragged}, on {jax.devices()[0].device_kind}\n")
    print(f"| t | backend | ms (quartiles) | times faster than {args.backends[0]} | temporary memory (MiB) | error |")
    print("|---|---|---|---|---|---|")
    for length in args.lengths:
        print("\n".join(rows(args, length)), flush=True)


if __name__ == "__main__":
    main()
