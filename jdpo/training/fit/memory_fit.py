"""Fits the step to the memory of the devices: tokens per device at once, and what the backward pass recomputes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from jdpo.devices import target
from jdpo.processes import max_over_processes
from jdpo.training.fit.compilation import compile_lowered
from jdpo.training.fit.host_memory import host_memory
from jdpo.training.step.objectives import Batch

MAX_TOKENS_PER_DEVICE = {"cpu": 16384, "gpu": 32768, "tpu": 32768}
"""Tokens of a device's part of a micro-batch where memory sets no limit: more make no step faster."""

ENOUGH_TOKENS = 4096
"""Fewer tokens than this leave a device's matrix units idle, so recomputing more is better than going below."""

TOKEN_STEP = 64
"""Budgets are multiples of this many tokens."""

SHARES = {"tpu": 0.92, "gpu": 0.96}
"""The share that a step may take of the memory that JAX may allocate on a device.

On TPU it is all of the memory, so the whole reserve has to be here. On GPU it is a pool: CUDA, NCCL and cuDNN allocate
outside of it, and the reserve in it is for gaps, as the temporaries of a step are one block. With the pool of 0.92 that
the command asks for, a step may take 0.88 of a GPU."""

SHARE_OF_HOST = 0.5
"""The share of the host's memory that steps may take if devices are CPUs: it holds much else."""

MOST_TRIALS = 3
"""Compilations at most to find the budget of a policy, in addition to the two that bound it."""

Lower = Callable[[str, int], Mapping[Batch, Any]]
"""(remat policy, tokens per device at most) -> the training step, lowered (`jax.stages.Lowered`) for each shape of
batches that may need the most memory; the keys are batches of jax.ShapeDtypeStructs."""


class Fit(NamedTuple):
    """A step that fits the memory of the devices.

    Attributes:
      remat: what the backward pass recomputes, a name of `REMAT_ORDER` or "offload".
      max_tokens_per_device: slots of a device's part of a micro-batch, at most.
      bytes_needed: bytes of a device's memory that the compiled step needs; None where it was not measured, or where
        not even one sequence at a time could be compiled.
    """

    remat: str
    max_tokens_per_device: int
    bytes_needed: int | None = None


def choose_fit(
    lower: Lower, *, policies: Sequence[str], most_tokens: int, limit: float, fixed_tokens: bool = False
) -> tuple[Fit, dict[Batch, Any]]:
    """Finds the first policy under which a step fits with enough tokens at once, and the most tokens that then fit.

    Where none fits, it is the last policy with as many tokens as fit; with one sequence at a time where even that is
    too much, so that the device decides. Every process must call this.

    Args:
      lower: gives the steps to compile; each is compiled once.
      policies: from the fastest to the one that needs the least memory.
      most_tokens: more are of no use.
      limit: bytes that a device has.
      fixed_tokens: True: the tokens are given, and only the policy is chosen.

    Returns:
      the fit, and the programs that were compiled for its policy, by the batches that they take.

    Raises:
      jax.errors.JaxRuntimeError: a compilation failed, and not for lack of memory.
    """
    # By shape, as several budgets may lead to the same batches.
    programs: dict[tuple[str, Batch], Any] = {}

    def bytes_needed(policy: str, tokens: int) -> float:
        steps = lower(policy, tokens)
        for batch, lowered in steps.items():
            if (policy, batch) not in programs:
                programs[policy, batch] = compile_if_memory_allows(lowered)
        needed = max(program_bytes(programs[policy, batch]) for batch in steps)
        return max_over_processes(needed)  # the processes must agree on one fit

    least_tokens = most_tokens if fixed_tokens else TOKEN_STEP
    fit = search_fit(bytes_needed, policies=policies, most_tokens=most_tokens, least_tokens=least_tokens, limit=limit)
    chosen = {batch: program for (policy, batch), program in programs.items() if policy == fit.remat}
    return fit, {batch: program for batch, program in chosen.items() if program is not None}


def search_fit(
    bytes_needed: Callable[[str, int], float],
    *,
    policies: Sequence[str],
    most_tokens: int,
    limit: float,
    least_tokens: int = TOKEN_STEP,
) -> Fit:
    """The search of `choose_fit`, in few trials.

    Args:
      bytes_needed: (policy, tokens) -> bytes that a device needs; inf where the step could not even be compiled.
      least_tokens: fewer are not tried.

    >>> search_fit(lambda remat, tokens: tokens * (9 if remat == "none" else 1), policies=["none", "full"],
    ...            most_tokens=8192, limit=40_000)
    Fit(remat='none', max_tokens_per_device=4416, bytes_needed=39744)
    """
    enough = max(min(ENOUGH_TOKENS, most_tokens), least_tokens)
    for policy in policies:
        most = bytes_needed(policy, most_tokens)
        # The common case: everything fits under the fastest policy, and a single compilation shows it.
        if most <= limit:
            return Fit(policy, most_tokens, int(most))
        # Too few tokens leave the devices idle, so a slower policy with more tokens is better than these.
        least = bytes_needed(policy, enough) if enough < most_tokens else most
        if least <= limit:
            return _between(bytes_needed, policy, (enough, least), (most_tokens, most), limit)
    # Nothing fits with enough tokens: halve them under the policy that needs the least.
    policy, tokens, needed = policies[-1], enough, least
    while needed > limit and tokens > least_tokens:
        tokens = max(tokens // 2 // TOKEN_STEP * TOKEN_STEP, TOKEN_STEP)
        needed = bytes_needed(policy, tokens)
    return Fit(policy, tokens, int(needed) if math.isfinite(needed) else None)


def _between(
    bytes_needed: Callable[[str, int], float],
    policy: str,
    fits: tuple[int, float],
    too_much: tuple[int, float],
    limit: float,
) -> Fit:
    """Closes in on the most tokens that fit; memory grows about linearly with them."""
    for _ in range(MOST_TRIALS):
        (low, low_bytes), (high, high_bytes) = fits, too_much
        # Interpolated where both ends compiled, bisected where the upper one did not.
        share = (limit - low_bytes) / (high_bytes - low_bytes) if math.isfinite(high_bytes) else 0.5
        tokens = int(low + share * (high - low)) // TOKEN_STEP * TOKEN_STEP
        if tokens <= low:
            break
        needed = bytes_needed(policy, tokens)
        if needed > limit:
            too_much = tokens, needed
        else:
            fits = tokens, needed
            # An interpolated budget that fits is close enough: the rest of the line is not worth a compilation.
            if math.isfinite(high_bytes):
                break
    return Fit(policy, fits[0], int(fits[1]))


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
