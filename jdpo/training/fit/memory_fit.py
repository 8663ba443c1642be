"""The memory that compiled programs need and that devices have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from jdpo.devices import target
from jdpo.processes import max_over_processes
from jdpo.training.fit.compilation import compile_lowered
from jdpo.training.fit.host_memory import host_memory

TOKEN_STEP = 64
"""Budgets are multiples of this many tokens."""

SHARES = {"tpu": 0.92, "gpu": 0.96}
"""The share that a step may take of the memory that JAX may allocate on a device.

On TPU it is all of the memory, so the whole reserve has to be here. On GPU it is a pool: CUDA, NCCL and cuDNN allocate
outside of it, and the reserve in it is for gaps, as the temporaries of a step are one block. With the pool of 0.92 that
the command asks for, a step may take 0.88 of a GPU."""

SHARE_OF_HOST = 0.5
"""The share of the host's memory that steps may take if devices are CPUs: it holds much else."""


class Fit(NamedTuple):
    """A step that fits the memory of the devices.

    Attributes:
      remat: what the backward pass recomputes, "none" or a name of `REMAT_POLICIES`.
      max_tokens_per_device: slots of a device's part of a micro-batch, at most.
      bytes_needed: bytes of a device's memory that the compiled step needs; None where it was not measured, or where
        not even one sequence at a time could be compiled.
    """

    remat: str
    max_tokens_per_device: int
    bytes_needed: int | None = None


# --- memory of programs and devices


def compile_if_memory_allows(lowered: Any) -> Any:
    """Compiles a lowered function; returns None where XLA finds that the device has too little memory for it.

    Raises:
      jax.errors.JaxRuntimeError: the compilation failed for another reason.
    """
    try:
        return compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        return None


def program_bytes(program: Any) -> float:
    """Returns the bytes of a device's memory that a compiled program needs: arguments, results and temporaries.

    Args:
      program: None, from `compile_if_memory_allows`, needs inf.
    """
    if program is None:
        return math.inf
    stats = program.memory_analysis()
    # libtpu's temp_size_in_bytes is not its heap, but up to twice as much. On CPU the peak leaves out all temporaries.
    if target().platform == "tpu":
        return int(stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes)
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes  # donated arguments, whose memory the results take
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def memory_limit() -> int:
    """Returns the bytes that a step may take of each device's memory; the same on every process."""
    device = jax.local_devices()[0]
    # Devices of the CPU share the memory of the host.
    if device.platform == "cpu":
        limit = host_memory().size * SHARE_OF_HOST / jax.local_device_count()
    else:
        # A platform that does not report its memory gets no limit: the run finds out.
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit", math.inf) * SHARES.get(device.platform, SHARES["gpu"])
    # Of the processes' limits the least, as a maximum of negated ones: all must choose the same fit.
    least = -max_over_processes(-limit)
    return int(least) if math.isfinite(least) else 2**63 - 1


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Returns True if a device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def exhaustion_as(message: Callable[[str], str]) -> Iterator[None]:
    """Raises a ValueError in place of pages from XLA where a device has too little memory.

    Args:
      message: takes the first line of XLA's, and says what to do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise ValueError(message(str(error).partition("\n")[0])) from error


def exhaustion_explained(fit: Fit) -> AbstractContextManager[None]:
    """Says how much was computed at once, and what to do, where a device has too little memory for a step."""
    return exhaustion_as(
        lambda cause: (
            f"a device has too little memory for a step of at most {fit.max_tokens_per_device:,} tokens at once under "
            f"remat {fit.remat} ({cause}). Set max_tokens_per_device or micro_batch_size lower, remat to full, a "
            "shorter max_length, or use more devices (docs/memory.md). Checkpoints are kept: the same command "
            "continues from the newest one"
        )
    )


def peak_memory() -> int:
    """Returns the most bytes that any local device has held so far; on CPU, that this process has held."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in of_device for of_device in stats):
        return max(int(of_device["peak_bytes_in_use"]) for of_device in stats)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
