"""What a run sets in jax: the dtype it computes in, what matrix products mean, and where compiled programs are kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jdpo.config import TrainConfig
from jdpo.data.prepared.prepare import cache_folder
from jdpo.training.fit.compilation import persistent_cache


def resolve_dtype(config: TrainConfig) -> TrainConfig:
    """Replaces compute_dtype auto by bfloat16 on TPU and GPU, float32 on CPU."""
    if config.compute_dtype != "auto":
        return config
    dtype: Any = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, compute_dtype=dtype)


def program_folder(config: TrainConfig) -> Path | None:
    """Where compiled programs are kept, None where they are not."""
    return cache_folder(config.cache_dir) / "programs" if config.compilation_cache else None


@contextlib.contextmanager
def jax_settings(config: TrainConfig) -> Iterator[None]:
    """What a run sets in jax: `numerics`, and where compiled programs are kept."""
    with numerics(config), persistent_cache(program_folder(config)):
        yield


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Makes jax mean what compute_dtype says while a run goes on, and puts back what was set before."""
    x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    try:
        # Settings of the whole process, not jax's thread-local contexts: orbax works in threads of its own.
        if config.compute_dtype == "float32":  # without this, TPUs multiply float32 in bfloat16 and GPUs in TF32
            jax.config.update("jax_default_matmul_precision", "float32")
        if config.compute_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
        jax.config.update("jax_enable_x64", x64)
