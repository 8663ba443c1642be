"""Which backend runs which attention: the limits of each, a choice, and what a program was compiled with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jdpo.models.attention.splash import LANES

BACKENDS = ("xla", "blockwise", "cudnn", "splash")

SHORT = {"cpu": 64, "tpu": LANES, "gpu": 1024}
"""Up to this many positions the plain path is taken where it is the other choice: few scores, and less to compile."""

_CUSTOM_CALLS = {"cudnn": "__cudnn$fmha", "splash": 'custom_call_target="tpu_custom_call"'}


def choose_attention(
    platform: str,
    dtype: Any,
    head_dim: int,
    length: int,
    softcap: float | None = None,
    window: int | None = None,
    tiled: bool = False,
) -> str:
    """The fastest backend that can run this.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` says.
      dtype: of activations.
      length: positions a sequence, padding included.
      tiled: the plain path, which has no tiles, is not taken, however short the sequences.

    >>> choose_attention("gpu", "bfloat16", 128, 2048)
    'cudnn'
    >>> choose_attention("gpu", "bfloat16", 256, 2048, softcap=50.0)
    'blockwise'
    """
    platform = _platform(platform)
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    limits = {"dtype": dtype, "head_dim": head_dim, "softcap": softcap, "window": window, "platform": platform}
    short = length <= SHORT.get(platform, SHORT["cpu"]) and not tiled
    if kernel and not any(_limits(kernel, **limits)) and not (kernel == "splash" and short):
        return kernel
    return "xla" if short else "blockwise"


def check_attention(
    backend: str,
    *,
    dtype: Any,
    head_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    platform: str | None = None,
) -> None:
    """Refuses what a backend cannot run.

    Args:
      block_q, block_kv: tile sizes that the user asked for.
      platform: "cpu", "gpu" or "tpu" to check that the backend runs there.

    Raises:
      ValueError: an unknown backend, or each limit that is in the way and the backends that have none.

    >>> check_attention("cudnn", dtype="float32", head_dim=64)
    Traceback (most recent call last):
    ...
    ValueError: attention backend 'cudnn' needs float16 or bfloat16 (found float32); xla, blockwise, splash can run this
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    limits = {"dtype": dtype, "head_dim": head_dim, "softcap": softcap, "window": window}
    limits |= {"block_q": block_q, "block_kv": block_kv, "platform": platform and _platform(platform)}
    broken = list(_limits(backend, **limits))
    if broken:
        able = [other for other in BACKENDS if not any(_limits(other, **limits))]
        who = f"{', '.join(able)} can run this" if able else "no backend can run this"
        raise ValueError(f"attention backend {backend!r} needs {' and '.join(broken)}; {who}")


def compiled_attention(hlo_text: str) -> frozenset[str]:
    """The backends that a compiled program holds, from its text (`compiled.as_text()`).

    A kernel counts only where its custom call is there, not where something took its place.
    """
    scopes = frozenset(re.findall(r"attention_(" + "|".join(BACKENDS) + r")\b", hlo_text))
    return frozenset(name for name in scopes if _CUSTOM_CALLS.get(name, "") in hlo_text)


def _platform(platform: str) -> str:
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def _limits(
    backend: str,
    *,
    dtype: Any,
    head_dim: int,
    softcap: float | None,
    window: int | None,
    platform: str | None,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Iterator[str]:
    """What the backend needs and does not find."""
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
        if platform not in (None, "gpu"):
            yield f"an NVIDIA GPU (found {platform})"
    if backend == "splash":
        if dtype.name not in ("float32", "bfloat16"):
            yield f"float32 or bfloat16 (found {dtype.name})"
        yield from (
            f"{n} to be a multiple of {LANES} (found {size})" for n, size in blocks.items() if size and size % LANES
        )
        if platform not in (None, "tpu"):
            yield f"a TPU (found {platform})"
