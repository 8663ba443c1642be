"""The device: its kind, memory and versions, and the rates of a matrix product and of a copy."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "libtpu")
REPEATS = 10


def run(name: str, request: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Measures the part."""
    device = jax.devices()[0]
    result = {
        "device_kind": device.device_kind,
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "num_cpus": os.cpu_count(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }
    save(result)
    size = 256 if request["tiny"] else 8192
    save({**result, "matmul_tflops": 2 * size**3 / _seconds(_product, size) / 1e12, **_copy(size)})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _product(size: int) -> tuple[Callable[..., jax.Array], list[jax.Array]]:
    keys = jax.random.split(jax.random.key(0))
    # Random values: a GPU multiplies zeros faster.
    return jnp.matmul, [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]


def _copy(size: int) -> dict[str, float]:
    def add(wide: int) -> tuple[Callable[..., jax.Array], list[jax.Array]]:
        return lambda x: x + 1, [jnp.zeros((wide, 4 * wide), jnp.float32)]

    num_bytes = 2 * 4 * 4 * size**2  # read and written
    return {"copy_gb_per_second": num_bytes / _seconds(add, size) / 1e9}


def _seconds(make: Callable[[int], tuple[Callable[..., jax.Array], list[jax.Array]]], size: int) -> float:
    """Returns the median seconds of a program on one device."""
    function, arrays = make(size)
    program = jax.jit(function)
    jax.block_until_ready(program(*arrays))
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
