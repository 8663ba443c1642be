"""Divides the memory that a step needs at its peak into kinds: weights, gradients, moments, activations and others.

Of a compiled step, the program's arguments are known exactly: weights, moments, a reference, the batch. The rest are
temporary values (`peak_values`), each of the kind that its place in the Python program and its shape tell:

    weights       copies of weights, in the compute dtype or another layout
    gradients     values with the shape of a device's part of a weight, from the backward pass, the sum over
                  micro-batches and the update
    head          the LM head: its gathered weights, their gradient, a chunk of logits
    activations   everything else of the forward and the backward pass: what is kept, and the layers at work, with
                  their gathered weights
    other         the rest, code, gaps between values, and what the compiler's lists do not account for

What they do not account for is first taken for gradients, up to their size, as XLA:GPU does not list values that loops
carry along. Of a step that was not compiled, all kinds are estimates by the formulas of
`jdpo.training.fit.estimates`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.planning.compiled_step import Compilation
from jdpo.planning.hlo.origins import origin_of
from jdpo.planning.planned_step import PlannedStep
from jdpo.planning.planner.peak_values import Value, values_at_peak
from jdpo.planning.target_plan import MemoryByKind
from jdpo.sharding.axes import num_batch_shards
from jdpo.training.fit.assembly import Assembly
from jdpo.training.fit.estimates import GRADIENT_BYTES, StepEstimate, batch_bytes, local_bytes, local_size
from jdpo.training.step.head_chunks import head_chunk_tokens


def compiled_memory(planned: PlannedStep, compilation: Compilation, needed: float) -> MemoryByKind:
    """Divides the bytes that a compiled or refused step needs.

    Args:
      needed: bytes of a device's memory.
    """
    arguments = _arguments(planned.assembly)
    shapes = _weight_shapes(planned.assembly)
    temporary: Counter[str] = Counter()
    for value in values_at_peak(compilation.text, compilation.live_ranges, compilation.buffers):
        temporary[kind_of(value, shapes)] += value.num_bytes
    free = needed - sum(arguments.values())
    total = sum(temporary.values())
    factor = min(1.0, max(free, 0) / total) if total else 0.0
    found = {name: arguments.get(name, 0) + int(factor * temporary[name]) for name in MemoryByKind.__annotations__}
    rest = int(needed) - sum(found.values())
    all_gradients = GRADIENT_BYTES * local_size(planned.assembly.state.params)
    unlisted = min(rest, max(all_gradients - found["gradients"], 0))
    found["gradients"] += unlisted
    return MemoryByKind(**found | {"other": found["other"] + rest - unlisted})


def estimated_memory(planned: PlannedStep, estimate: StepEstimate) -> MemoryByKind:
    """Estimates the memory of a step by kind without compiling it."""
    assembly, mesh = planned.assembly, planned.assembly.setup.mesh
    model = assembly.model
    arguments = _arguments(assembly)
    # What the estimate gathers belongs to the head for the most part, and to two layers.
    itemsize, vocabulary = jnp.dtype(model.compute_dtype).itemsize, model.config.vocab_size / mesh.shape["tensor"]
    gathered = itemsize * model.config.d_model * vocabulary if mesh.size > 1 else 0
    gradients = GRADIENT_BYTES * local_size(assembly.state.params)
    layers = estimate.fixed_bytes - local_bytes((assembly.state, assembly.frozen)) - gradients - gathered
    chunk = head_chunk_tokens(mesh.devices.flat[0].device_kind, model.compute_dtype, model.config.vocab_size)
    return MemoryByKind(
        weights=arguments["weights"],
        gradients=gradients,
        moments=arguments["moments"],
        reference=arguments["reference"],
        activations=int(layers + batch_bytes(assembly, planned.remat, planned.batch)),
        # A chunk of float32 logits, and their gradient.
        head=int(gathered + 2 * 4 * chunk * vocabulary),
        other=arguments["other"] + _bytes_of_batch(planned),
    )


def kind_of(value: Value, weight_shapes: frozenset[tuple[int, ...]]) -> str:
    """Returns the kind of a temporary value, as the field of MemoryByKind.

    Args:
      weight_shapes: `_shape` of the parts of trained weights that a device holds.
    """
    name = value.op_name
    if name.startswith(("state.params", "frozen.base")):
        return "weights"
    if name.startswith(("frozen.reference", "state.reference_params")):
        return "reference"
    differentiated, backward = "jvp" in name, "transpose(" in name
    if value.array is not None and _shape(value.array.dims) in weight_shapes:
        return "weights" if differentiated and not backward else "gradients"
    if origin_of(name).startswith("head"):
        return "head"
    if differentiated or value.in_loop:
        return "activations"
    return "other"


def _shape(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of an array in ascending order, without axes of one: the same for every layout."""
    return tuple(sorted(size for size in dims if size != 1))


def _weight_shapes(assembly: Assembly) -> frozenset[tuple[int, ...]]:
    shapes = {_shape(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(assembly.state.params)}
    return frozenset(shape for shape in shapes if shape)


def _arguments(assembly: Assembly) -> dict[str, int]:
    """The bytes of a device for the arguments of the step except the batch, by kind."""
    state, frozen = assembly.state, assembly.frozen
    kinds = {
        "weights": local_bytes((state.params, frozen.base)),
        "moments": local_bytes(state.opt_state),
        "reference": local_bytes((state.reference_params, frozen.reference)),
    }
    return kinds | {"other": local_bytes((state, frozen)) - sum(kinds.values())}


def _bytes_of_batch(planned: PlannedStep) -> int:
    shards = num_batch_shards(planned.assembly.setup.mesh)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _leaves(planned.batch)) // shards


def _leaves(batch: Any) -> list[Any]:
    leaves: list[Any] = jax.tree.leaves(batch)
    return leaves
