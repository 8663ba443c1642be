"""The configuration of jax for a run: compute dtype, precision of matrix products, and the cache of programs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jdpo.config import MemorySettings
from jdpo.data.prepared.prepare import cache_folder
from jdpo.devices import target

MOST_BYTES = 10 * 2**30
"""Compiled programs that are kept for one kind of machine."""

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept. jax's own limit of a second leaves out all programs of a toy, and helpers
that every start of a run compiles again."""

M = TypeVar("M", bound=MemorySettings)


def resolve_dtype(settings: M) -> M:
    """Replaces compute_dtype auto by bfloat16 on TPU and GPU, float32 on CPU."""
    if settings.compute_dtype != "auto":
        return settings
    dtype: Any = "float32" if target().platform == "cpu" else "bfloat16"
    return dataclasses.replace(settings, compute_dtype=dtype)


@contextlib.contextmanager
def jax_settings(settings: MemorySettings, cache_dir: str | None) -> Iterator[None]:
    """Configures jax for the duration of a run: `numerics`, and the cache of compiled programs."""
    folder = cache_folder(cache_dir) / "programs" if settings.compilation_cache else None
    with numerics(settings), persistent_cache(folder):
        yield


@contextlib.contextmanager
def numerics(settings: MemorySettings) -> Iterator[None]:
    """Configures jax to compute as compute_dtype says, and restores its configuration at the end."""
    config: Any = jax.config  # its values have no annotations
    x64, precision = config.jax_enable_x64, config.jax_default_matmul_precision
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


@contextlib.contextmanager
def persistent_cache(folder: Path | None) -> Iterator[None]:
    """Keeps compiled programs in `folder` while the block runs, where later starts find them.

    Where the user has set jax's own jax_compilation_cache_dir, that one is used.

    Args:
      folder: None: programs are not kept.
    """
    config: Any = jax.config
    if folder is None or config.jax_compilation_cache_dir:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    folder = folder / _machine()
    drop_oldest(folder, MOST_BYTES)
    least = config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min(least, LEAST_SECONDS))
        compilation_cache.reset_cache()  # jax reads the setting at its first compilation, and not again
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()


def drop_oldest(folder: Path, most_bytes: int) -> None:
    """Deletes the oldest files of a folder until the rest takes at most `most_bytes`."""
    files = []
    with contextlib.suppress(OSError):  # another run may drop files, too
        # Newest first, so that the running total decides which of the older ones go.
        files = sorted(((path.stat(), path) for path in folder.glob("*")), key=lambda file: -file[0].st_mtime_ns)
    total = 0
    for stat, path in files:
        total += stat.st_size
        if total > most_bytes:
            with contextlib.suppress(OSError):
                path.unlink()


def _machine() -> str:
    """A folder name for machines that can run each other's programs; programs for CPUs use all features of theirs."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"{platform.machine()}-{_cpu_features()}"
    return f"{jax.default_backend()}-{kind}".replace(" ", "-").replace("/", "-")


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "any"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]
