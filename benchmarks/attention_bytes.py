"""Bytes that attention moves in programs compiled for a TPU or GPU that this machine does not have; nothing runs.

    python benchmarks/attention_bytes.py v5p-8 [--lengths T ...] [--sequence L] [--tokens N]
    python benchmarks/attention_bytes.py h200 [--heads 12 --kv-heads 2]

Compiles output and gradients of sequences of `--sequence` tokens , `--tokens` in total on each device: one
sequence per row of t places, and as many as fit. On a TPU the second also with splash's fused backward kernel, on a
GPU with cuDNN's packed offsets, for which JAX 0.10 needs as many key heads as query heads, so these are repeated.
Reported are a device's peak and temporary memory, as the compiler planned them, and the traffic that the program shows:
operands and results of the kernels, and of all other operations. `benchmarks/README.md` says how to make an environment
with the compilers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdpo.models.attention import causal_attention, segment_starts
from jdpo.planning.compile_only import compile_only_devices
from jdpo.planning.compiled_step import compiling_on
from jdpo.planning.hlo.hlo_text import parse
from jdpo.planning.machines import Machine, machine_of
from jdpo.planning.roofline import Roofline, Speeds

MIB = 2**20


def packed_cudnn(query: Any, key: Any, value: Any, lengths: Any) -> Any:
    """Runs cuDNN's kernel on rows of several sequences, by JAX's private function."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    repeats, sizes = query.shape[2] // key.shape[2], jnp.where(lengths > 0, lengths, -1)
    starts = jnp.where(lengths > 0, jnp.cumsum(lengths, 1) - lengths, -1)
    offsets = jnp.concatenate([starts, jnp.full((len(starts), 1), -1, jnp.int32)], 1)
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    # The kernel leaves places between sequences as they are, in output and gradients.
    real = (jnp.arange(query.shape[1]) < lengths.sum(1)[:, None])[..., None, None]
    operands = (jnp.where(real, x, 0) for x in (query, key, value))
    output = dot_product_attention(
        *operands,
        q_seqlen=sizes,
        kv_seqlen=sizes,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=query.shape[3] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return jnp.where(real, output, 0)


@contextmanager
def fused_backward() -> Iterator[None]:
    """Makes splash's kernels with the fused backward pass."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make = splash.BlockSizes

    def fused(**sizes: Any) -> Any:
        kept = {name: size for name, size in sizes.items() if not name.endswith("_dq")}
        return make(**kept, use_fused_bwd_kernel=True)

    with mock.patch.object(splash, "BlockSizes", fused):
        yield


def compiled(args: argparse.Namespace, machine: Machine, length: int, arm: str) -> Any:
    """Compiles output and gradients of the rows of an arm on every device."""
    devices = compile_only_devices(machine)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    per_row = 1 if arm == "one per row" else length // args.sequence
    rows = args.tokens // (args.sequence * per_row)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(devices) * rows, *shape), dtype, sharding=split)

    def attend(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        if arm == "packed offsets":
            return packed_cudnn(query, key, value, lengths)
        segments = segment_starts(lengths, length)
        backend = "cudnn" if machine.is_gpu else "splash"
        return causal_attention(query, key, value, lengths=lengths, segments=segments, backend=backend)

    def step(query: Any, key: Any, value: Any, cotangent: Any, lengths: Any) -> Any:
        output, pullback = jax.vjp(lambda *operands: attend(*operands, lengths), query, key, value)
        return output, *pullback(cotangent)

    spec = PartitionSpec("data")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    of_query, of_key = (array(length, heads, args.head_dim) for heads in (args.heads, args.kv_heads))
    lengths = array(per_row, dtype=jnp.int32)
    return jax.jit(sharded).lower(of_query, of_key, of_key, of_query, lengths).compile()


def traffic(machine: Machine, text: str) -> tuple[list[int], int]:
    """Returns the bytes of operands and results of each kernel, and those of all other operations together."""
    roofline = Roofline(
        parse(text), speeds=Speeds({}, 1.0), num_devices=machine.num_devices, link_seconds=lambda _: 0.0
    )
    kernels, rest = [], 0
    for executed in roofline.executed():
        target = executed.op.target or ""
        if target == "tpu_custom_call" or target.startswith("__cudnn$fmha"):
            kernels.append(executed.cost.num_bytes)
        else:
            rest += executed.times * executed.cost.num_bytes
    return kernels, rest


def row(args: argparse.Namespace, machine: Machine, length: int, arm: str) -> str:
    patch = fused_backward() if arm.endswith("fused backward") else nullcontext()
    with compiling_on(machine), patch:
        program = compiled(args, machine, length, arm)
    if args.dump:
        args.dump.mkdir(exist_ok=True, parents=True)
        (args.dump / f"{machine.name}-{length}-{arm}.hlo").write_text(program.as_text(), encoding="utf-8")
    memory, (kernels, rest) = program.memory_analysis(), traffic(machine, program.as_text())
    figures = [memory.peak_memory_in_bytes, memory.temp_size_in_bytes, sum(kernels), rest, sum(kernels) + rest]
    columns = [length, arm, *(f"{figure / MIB:.0f}" for figure in figures)]
    return f"| {' | '.join(map(str, columns))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 4096], help="places of a row")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16384, help="of all sequences on a device")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--arms", nargs="+", help="some of the arms")
    parser.add_argument("--dump", type=Path, help="folder for the programs")
    args = parser.parse_args()
    machine = machine_of(args.machine)
    arms = ["one per row", "packed offsets"] if machine.is_gpu else ["one per row", "packed", "packed, fused backward"]
    print(
        f"{args.heads} heads, {args.kv_heads} key heads of {args.head_dim}, {args.tokens} tokens in sequences of "
        f"{args.sequence}, {machine.name}; MiB per device, estimated: compiled, not run\n"
    )
    print("| t | rows | peak | temporary | traffic of kernels | of other operations | of all |")
    print(f"|{'---|' * 7}")
    for length in args.lengths:
        for arm in args.arms or arms:
            print(row(args, machine, length, arm), flush=True)


if __name__ == "__main__":
    main()
