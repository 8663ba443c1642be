"""How much a device computes at once, and what its backward pass recomputes: the fastest that fits its memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jdpo.processes import most_of_processes
from jdpo.training.fit.host_memory import host_memory

MAX_TOKENS_PER_DEVICE = {"cpu": 16384, "gpu": 32768, "tpu": 32768}
"""Tokens of a device's part of a micro-batch where memory sets no limit: more make no step faster."""

ENOUGH_TOKENS = 4096
"""Fewer than these leave a device's matrix units idle: rather recompute than go below."""

TOKEN_STEP = 64
"""Budgets are multiples of it."""

SHARE_OF_DEVICE, SHARE_OF_HOST = 0.92, 0.5
"""How much of a device's memory a step may take; of the host's, which on CPU holds much else."""

MOST_TRIALS = 3
"""Compilations at most to find the budget of a policy, beside the two that bound it."""


class Fit(NamedTuple):
    """What was settled on.

    Attributes:
      remat: what the backward pass recomputes, a name of `REMAT_ORDER` or "offload".
      max_tokens_per_device: slots of a device's part of a micro-batch, at most.
      bytes_needed: of a device's memory, by the compiled step; None where nobody asked.
    """

    remat: str
    max_tokens_per_device: int
    bytes_needed: int | None = None


def choose_fit(
    bytes_needed: Callable[[str, int], float], *, policies: Sequence[str], most_tokens: int, limit: float
) -> Fit:
    """The first policy under which a step fits with enough tokens at once, and the most tokens that fit under it.

    Where none does, the last policy with as many tokens as fit; with one sequence at a time where even that is too
    much, so that the device decides.

    Args:
      bytes_needed: (policy, tokens) -> bytes a device needs; inf where the step could not even be compiled.
      policies: from the fastest to the smallest.
      most_tokens: more are of no use.
      limit: bytes a device has.

    >>> choose_fit(lambda remat, tokens: tokens * (9 if remat == "none" else 1), policies=["none", "full"],
    ...            most_tokens=8192, limit=40_000)
    Fit(remat='none', max_tokens_per_device=4416, bytes_needed=39744)
    """
    enough = min(ENOUGH_TOKENS, most_tokens)
    for policy in policies:
        most = bytes_needed(policy, most_tokens)
        if most <= limit:
            return Fit(policy, most_tokens, int(most))
        least = bytes_needed(policy, enough) if enough < most_tokens else most
        if least <= limit:
            return _between(bytes_needed, policy, (enough, least), (most_tokens, most), limit)
    policy, tokens, needed = policies[-1], enough, least
    while needed > limit and tokens > TOKEN_STEP:
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
    """Closes in on the most tokens that fit: memory grows about as a line."""
    for _ in range(MOST_TRIALS):
        (low, low_bytes), (high, high_bytes) = fits, too_much
        share = (limit - low_bytes) / (high_bytes - low_bytes) if math.isfinite(high_bytes) else 0.5
        tokens = int(low + share * (high - low)) // TOKEN_STEP * TOKEN_STEP
        if tokens <= low:
            break
        needed = bytes_needed(policy, tokens)
        if needed > limit:
            too_much = tokens, needed
        else:
            fits = tokens, needed
            if math.isfinite(high_bytes):
                break
    return Fit(policy, fits[0], int(fits[1]))


def program_bytes(program: Any) -> int:
    """Bytes of a device's memory that a compiled program needs: arguments, results and all it keeps in between."""
    stats = program.memory_analysis()
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes  # donated arguments, whose room results take
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def memory_limit() -> int:
    """Bytes that a step may take of each device's memory; the same on every process."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        limit = host_memory().size * SHARE_OF_HOST / jax.local_device_count()
    else:
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit", math.inf) * SHARE_OF_DEVICE
    least = -most_of_processes(-limit)
    return int(least) if math.isfinite(least) else 2**63 - 1


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether that is a device that has not memory enough."""
    return "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def exhaustion_explained(fit: Fit) -> Iterator[None]:
    """Says what to do where a device has not memory enough for a step, in place of pages of XLA's own.

    Raises:
      ValueError: naming what was computed at once.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise ValueError(
            f"a device has not memory enough for a step of at most {fit.max_tokens_per_device:,} tokens at once under "
            f"remat {fit.remat} ({str(error).partition(chr(10))[0]}). Set max_tokens_per_device or micro_batch_size "
            "lower, remat to full, a shorter max_length, or use more devices (docs/memory.md); checkpoints stand, and "
            "the same command goes on from the newest"
        ) from error


def peak_memory() -> int:
    """The most bytes that any local device has held so far; on CPU, that this process has."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in of_device for of_device in stats):
        return max(int(of_device["peak_bytes_in_use"]) for of_device in stats)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
