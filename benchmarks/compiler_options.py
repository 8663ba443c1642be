"""Claim: the options of `jdpo.training.fit.compiler_options` let communication run next to matrix products.

    python benchmarks/compiler_options.py v5e-64 [--sets none jdpo] [--options '{"name": true}'] [--mesh 8x8]

Compiles a small program with the collectives of a fully sharded step, three MLP layers of the size of Llama-3.1-8B with
4,096 tokens per device, gradients, and an update with momentum, for a machine that need not be at hand, and prints the
parts of its estimated time: seconds of work in place of the minutes that a whole step takes. Compiled, not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdpo.models.layers import project
from jdpo.planning.compile_only import compile_only_devices
from jdpo.planning.compiled_step import compiling_on
from jdpo.planning.hlo.hlo_text import parse
from jdpo.planning.links import link_seconds, links_of, places_of
from jdpo.planning.machines import Machine, machine_of
from jdpo.planning.roofline import Roofline, Speeds
from jdpo.training.fit.compiler_options import options_of

LAYERS, D, F, TOKENS = 3, 4096, 14336, 4096


def layer(x_ntd: Any, weights: Any) -> tuple[Any, None]:
    gate, up, down = (kernel.astype(jnp.bfloat16) for kernel in weights)
    hidden = jax.nn.silu(project("ntd,df->ntf", x_ntd, gate)) * project("ntd,df->ntf", x_ntd, up)
    return x_ntd + project("ntf,fd->ntd", hidden, down), None


def loss(weights: Any, x_ntd: Any) -> Any:
    recomputed = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    return jnp.mean(jnp.square(jax.lax.scan(recomputed, x_ntd, weights)[0].astype(jnp.float32)))


def step(weights: Any, momentum: Any, x_ntd: Any, shardings: Any) -> tuple[Any, Any, Any]:
    value, grads = jax.value_and_grad(loss)(weights, x_ntd)
    grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, shardings)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
    return jax.tree.map(lambda w, m: w - 1e-3 * m, weights, momentum), momentum, value


def lower(mesh: Any, split: str | tuple[str, ...]) -> Any:
    """Lowers the step with weights split over some axes of the mesh, and the batch over all of them."""
    of = partial(NamedSharding, mesh)
    shardings = (of(PartitionSpec(None, split)), of(PartitionSpec(None, split)), of(PartitionSpec(None, None, split)))
    shapes = ((LAYERS, D, F), (LAYERS, D, F), (LAYERS, F, D))
    pairs = zip(shapes, shardings, strict=True)
    weights = tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape, sharding in pairs)
    rows = of(PartitionSpec(mesh.axis_names))
    x_ntd = jax.ShapeDtypeStruct((mesh.size, TOKENS, D), jnp.bfloat16, sharding=rows)
    jitted = jax.jit(
        partial(step, shardings=shardings), out_shardings=(shardings, shardings, None), donate_argnums=(0, 1)
    )
    return jitted.lower(weights, weights, x_ntd)


def measure(machine: Machine, mesh: Any, lowered: Any, options: dict[str, Any]) -> dict[str, float]:
    """Compiles with options, and returns milliseconds, MiB on the wire per device, and the peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options=options | {"xla_dump_to": folder})
        text = max((file.read_text() for file in Path(folder).glob("*after_optimizations.txt")), key=len)
    links, places = links_of(machine), places_of(machine, tuple(mesh.devices.flat))
    speeds = Speeds({name: tera * 1e12 for name, tera in machine.chip.tera_flops.items()}, machine.chip.hbm_bandwidth)
    found = Roofline(
        parse(text),
        speeds=speeds,
        num_devices=mesh.size,
        link_seconds=lambda collective: link_seconds(collective, places, links),
    )
    seconds = dataclasses.asdict(found.seconds()) | {"total": found.seconds().total}
    wire = sum(each.times * each.collective.wire_bytes for each in found.communications())
    return {name: round(1e3 * value, 2) for name, value in seconds.items() if name != "flops"} | {
        "wire_mib": round(wire / 2**20),
        "peak_mib": round(program.memory_analysis().peak_memory_in_bytes / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="v5e-64, v5p-64, h100x8, ...")
    parser.add_argument("--sets", nargs="+", choices=("none", "jdpo"), default=["none", "jdpo"])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON; added to each set")
    parser.add_argument("--mesh", help="two axes: 8x8 splits weights over both, 8xcopies=8 over the first")
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    machine = machine_of(asked.machine)
    devices = compile_only_devices(machine)
    sizes = [int(size.removeprefix("copies=")) for size in asked.mesh.split("x")] if asked.mesh else [len(devices)]
    names = ("fsdp", "copies" if asked.mesh and "copies" in asked.mesh else "more")[: len(sizes)]
    with compiling_on(machine):
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)
        with jax.set_mesh(mesh):
            lowered = lower(mesh, tuple(name for name in names if name != "copies"))
        for name in asked.sets:
            options = (options_of(mesh) if name == "jdpo" else {}) | asked.options
            print(json.dumps({"machine": asked.machine, "options": name} | measure(machine, mesh, lowered, options)))


if __name__ == "__main__":
    main()
