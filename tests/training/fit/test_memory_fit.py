"""The memory of programs and devices."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdpo.devices import Target, compiling_for
from jdpo.training.fit.memory_fit import Fit, exhaustion_explained, peak_memory, program_bytes


def test_a_device_without_enough_memory_is_an_error_with_advice() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nPages of it\nfollow.")
    with (
        pytest.raises(
            ValueError, match=r"at most 4,096 tokens at once under remat dots \(RES.*3 bytes\.\)\. Set max_t"
        ),
        exhaustion_explained(Fit("dots", 4096)),
    ):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), exhaustion_explained(Fit("dots", 4096)):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_bytes_of_a_program_count_a_donated_argument_once() -> None:
    array = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def add(x: jax.Array) -> jax.Array:
        return x + 1

    kept, donated = (jax.jit(add, donate_argnums=at).lower(array).compile() for at in ((), 0))
    assert program_bytes(kept) - program_bytes(donated) == 4096
    assert program_bytes(donated) >= 4096


def deep_gradient(width: int, rows: int, sharding: Any = None) -> Any:
    """Compiles the gradient of three layers, whose activations are its temporaries."""

    def loss(weight: jax.Array, rows: jax.Array) -> jax.Array:
        for _ in range(3):
            rows = jnp.tanh(rows @ weight)
        return (rows**2).sum()

    shapes = [jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=sharding) for size in (width, rows)]
    return (
        jax.jit(lambda weight, rows: weight - jax.grad(loss)(weight, rows), donate_argnums=0).lower(*shapes).compile()
    )


def test_on_tpu_the_peak_counts_and_elsewhere_the_sum_of_the_parts() -> None:
    program = deep_gradient(128, 1024)
    stats = program.memory_analysis()
    parts = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.temp_size_in_bytes >= 2 * 4 * 128 * 1024
    # On CPU the peak is that of arguments and results alone.
    assert stats.peak_memory_in_bytes < parts + stats.temp_size_in_bytes / 2
    assert program_bytes(program) >= parts + stats.temp_size_in_bytes
    with compiling_for(Target("gpu", "9.0")):
        assert program_bytes(program) >= parts + stats.temp_size_in_bytes
    with compiling_for(Target("tpu")):
        assert program_bytes(program) == stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
def test_the_peak_of_a_tpu_program_holds_its_arguments_and_activations() -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    program = deep_gradient(1024, 8192, jax.sharding.SingleDeviceSharding(devices[0]))
    stats, activations = program.memory_analysis(), 3 * 4 * 1024 * 8192
    with compiling_for(Target("tpu")):
        needed = program_bytes(program)
    assert stats.argument_size_in_bytes + activations <= needed < stats.argument_size_in_bytes + 2 * activations
    # The reason: this figure is not the program's heap.
    assert stats.temp_size_in_bytes < activations / 2


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory()
    held = bytearray(2**27)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() >= before
    assert peak_memory() >= 2**27
