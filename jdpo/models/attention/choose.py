"""Chooses and checks the backend of attention, by the limits of each, and finds those in compiled programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jdpo.devices import target
from jdpo.models.attention.splash import LANES

BACKENDS = ("xla", "blockwise", "cudnn", "splash")

SHORT = {"cpu": 64, "tpu": LANES, "gpu": 1024}
"""Up to this many positions the plain path is used instead of tiles: there are few scores, and it compiles faster."""

# The marks of the kernels in compiled programs; the backends in plain JAX have none.
_CUSTOM_CALLS = {"cudnn": "__cudnn$fmha", "splash": 'custom_call_target="tpu_custom_call"'}


def choose_attention(
    platform: str,
    dtype: Any,
    head_dim: int,
    length: int,
    softcap: float | None = None,
    window: int | None = None,
    sinks: bool = False,
    tiled: bool = False,
    compute_capability: str | None = None,
) -> str:
    """Returns the fastest backend that supports these settings.

    Args:
      platform: "cpu", "gpu" or "tpu", the value of `jax.default_backend()`.
      dtype: dtype of activations.
      length: number of positions of a sequence, padding included.
      sinks: True if heads have attention sinks.
      tiled: True if tile sizes are set; then the backends without tiles, plain and cuDNN, are not used.
      compute_capability: see `check_attention`.

    >>> choose_attention("gpu", "bfloat16", 128, 2048, compute_capability="8.0")
    'cudnn'
    >>> choose_attention("gpu", "bfloat16", 256, 2048, compute_capability="8.0")
    'blockwise'
    """
    platform = _platform(platform)
    limits: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "softcap": softcap, "window": window}
    limits |= {"sinks": sinks, "platform": platform}
    limits["compute_capability"] = compute_capability or _compute_capability(platform)
    # Tile sizes are an explicit request for tiles, even for short sequences.
    short = length <= SHORT.get(platform, SHORT["cpu"]) and not tiled
    if platform == "gpu" and not tiled and not any(_limits("cudnn", **limits)):
        return "cudnn"
    if platform == "tpu" and not short and not any(_limits("splash", **limits)):
        return "splash"
    return "xla" if short else "blockwise"


def check_attention(
    backend: str,
    *,
    dtype: Any,
    head_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    sinks: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    platform: str | None = None,
    compute_capability: str | None = None,
) -> None:
    """Refuses settings that a backend does not support.

    Args:
      block_q, block_kv: tile sizes that the user asked for.
      platform: "cpu", "gpu" or "tpu" to check that the backend runs there.
      compute_capability: that of the GPU, such as "9.0"; any other text means a GPU that is not NVIDIA's. The default
        is that of this process's GPU, if it has one.

    Raises:
      ValueError: the backend is unknown, or lacks something; the backends that support the settings are named.

    >>> check_attention("cudnn", dtype="float32", head_dim=64)
    Traceback (most recent call last):
    ...
    ValueError: attention backend 'cudnn' needs float16 or bfloat16 (found float32); xla, blockwise, splash can run this
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    limits: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "softcap": softcap, "window": window}
    limits |= {"sinks": sinks, "block_q": block_q, "block_kv": block_kv}
    if platform is not None:
        limits["platform"] = platform = _platform(platform)
        limits["compute_capability"] = compute_capability or _compute_capability(platform)
    broken = list(_limits(backend, **limits))
    if broken:
        able = [other for other in BACKENDS if not any(_limits(other, **limits))]
        who = f"{', '.join(able)} can run this" if able else "no backend can run this"
        raise ValueError(f"attention backend {backend!r} needs {' and '.join(broken)}; {who}")


def sequences_per_row(backend: str, platform: str) -> int | None:
    """Returns the most sequences that a row of attention should hold back to back; None for any number.

    Args:
      backend: as resolved for the rows' length: not "auto".
      platform: as for `choose_attention`.

    >>> sequences_per_row("blockwise", "cpu"), sequences_per_row("blockwise", "gpu")
    (None, 1)
    """
    # cuDNN's packed offsets are reachable by a private function of JAX only, which up to 0.10.2 takes those of keys for
    # offsets of query heads (jax-ml/jax#39521): with grouped queries, tokens would silently see other sequences' keys.
    if backend == "cudnn":
        return 1
    # Away from CPUs blockwise attention handles all rows in one loop, which computes what any of them needs: with
    # several sequences that start at different places, almost everything.
    return 1 if backend == "blockwise" and _platform(platform) != "cpu" else None


def compiled_attention(hlo_text: str) -> frozenset[str]:
    """Returns the backends in a compiled program, from its text (`compiled.as_text()`).

    A kernel counts only if its custom call is in the program.
    """
    # `causal_attention` puts each backend in a named scope, which survives compilation as metadata.
    scopes = frozenset(re.findall(r"attention_(" + "|".join(BACKENDS) + r")\b", hlo_text))
    return frozenset(name for name in scopes if _CUSTOM_CALLS.get(name, "") in hlo_text)


def _platform(platform: str) -> str:
    # JAX distinguishes cuda and rocm where it lowers programs; its default backend is just "gpu".
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def _compute_capability(platform: str) -> str | None:
    """Returns the compute capability of the GPU that programs are made for, see `check_attention`, or None."""
    made_for = target()
    return made_for.compute_capability if platform == made_for.platform == "gpu" else None


def _limits(
    backend: str,
    *,
    dtype: Any,
    head_dim: int,
    softcap: float | None,
    window: int | None,
    sinks: bool,
    platform: str | None = None,
    compute_capability: str | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Iterator[str]:
    """Yields the requirements of a backend that the settings do not meet."""
    dtype = jnp.dtype(dtype)
    if window is not None and window < 1:
        yield f"a window of at least 1 (found {window})"
    if softcap is not None and softcap <= 0:
        yield f"a softcap above 0 (found {softcap})"
    blocks = {"block_q": block_q, "block_kv": block_kv}
    if backend in ("xla", "cudnn"):
        yield from (f"no {name} (found {size})" for name, size in blocks.items() if size is not None)
    if backend == "blockwise":
        if len({size for size in blocks.values() if size is not None}) > 1:
            yield f"block_q and block_kv to be equal (found {block_q} and {block_kv})"
        yield from (f"{n} to be a multiple of 16 (found {size})" for n, size in blocks.items() if size and size % 16)
    if backend == "cudnn":
        if dtype.name not in ("float16", "bfloat16"):
            yield f"float16 or bfloat16 (found {dtype.name})"
        if head_dim % 8 or head_dim > 256:
            yield f"a head_dim that is a multiple of 8 and at most 256 (found {head_dim})"
        if softcap is not None:
            yield f"no softcap (found {softcap})"
        if sinks:
            yield "no attention sinks (found one for each head)"
        if platform not in (None, "gpu"):
            yield f"an NVIDIA GPU (found {platform})"
        elif compute_capability is not None:
            yield from _limits_of_gpu(compute_capability, head_dim)
    if backend == "splash":
        if dtype.name not in ("float32", "bfloat16"):
            yield f"float32 or bfloat16 (found {dtype.name})"
        yield from (
            f"{n} to be a multiple of {LANES} (found {size})" for n, size in blocks.items() if size and size % LANES
        )
        if platform not in (None, "tpu"):
            yield f"a TPU (found {platform})"


def _limits_of_gpu(compute_capability: str, head_dim: int) -> Iterator[str]:
    """Yields unmet requirements of cuDNN's kernels on a GPU: those of JAX (`check_is_flash_attention`) and XLA."""
    if not re.fullmatch(r"\d+\.\d+", compute_capability):
        yield f"an NVIDIA GPU (found {compute_capability})"
        return
    found = tuple(int(part) for part in compute_capability.split("."))
    # Kernels with wide heads exist since Hopper, all others since Ampere.
    least = (9, 0) if head_dim > 128 else (8, 0)
    if found < least:
        heads = f" for a head_dim of {head_dim}" if found >= (8, 0) else ""
        yield f"an NVIDIA GPU of compute capability {least[0]}.{least[1]} or more{heads} (found {compute_capability})"
