"""The configuration of jax for a run: compute dtype, precision of matrix products, and the cache of programs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jdpo.config import MemorySettings
from jdpo.data.prepared.prepare import cache_folder
from jdpo.training.fit.compilation import persistent_cache

M = TypeVar("M", bound=MemorySettings)


def resolve_dtype(settings: M) -> M:
    """Replaces compute_dtype auto by bfloat16 on TPU and GPU, float32 on CPU."""
    if settings.compute_dtype != "auto":
        return settings
    dtype: Any = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(settings, compute_dtype=dtype)


def program_folder(settings: MemorySettings, cache_dir: str | None) -> Path | None:
    """Returns the folder of compiled programs, or None if they are not kept."""
    return cache_folder(cache_dir) / "programs" if settings.compilation_cache else None


@contextlib.contextmanager
def jax_settings(settings: MemorySettings, cache_dir: str | None) -> Iterator[None]:
    """Configures jax for the duration of a run: `numerics`, and the cache of compiled programs."""
    with numerics(settings), persistent_cache(program_folder(settings, cache_dir)):
        yield


@contextlib.contextmanager
def numerics(settings: MemorySettings) -> Iterator[None]:
    """Configures jax to compute as compute_dtype says, and restores its configuration at the end."""
    x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    try:
        # Settings of the whole process, not jax's thread-local contexts: orbax works in threads of its own.
        if settings.compute_dtype == "float32":  # without this, TPUs multiply float32 in bfloat16 and GPUs in TF32
            jax.config.update("jax_default_matmul_precision", "float32")
        if settings.compute_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
        jax.config.update("jax_enable_x64", x64)
