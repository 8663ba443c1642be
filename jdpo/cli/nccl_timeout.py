"""The time after which XLA ends a process that waits for others to connect by NCCL, later than the watchdog."""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Iterable, MutableMapping
from pathlib import Path

FLAG = "xla_gpu_nccl_termination_timeout_seconds"
"""By default XLA waits for good. It is a flag and no option of a program: XLA reads it from XLA_FLAGS alone."""

MARGIN_SECONDS = 300


def limit_nccl(environment: MutableMapping[str, str], libraries: Iterable[Path], *, watchdog_seconds: float) -> None:
    """Sets the flag in XLA_FLAGS, unless the user has set it or a library does not know it.

    Call it before JAX looks for devices, where there are GPUs.

    Args:
      environment: the environment variables.
      libraries: the shared libraries that read XLA_FLAGS: they abort the process for a flag that they do not know.
      watchdog_seconds: deadline of the first steps, in which processes connect; the watchdog comes first, as its
        message says more than XLA's.
    """
    flags = environment.get("XLA_FLAGS", "")
    found = list(libraries)
    if FLAG in flags or not found or not all(_knows(library) for library in found):
        return
    environment["XLA_FLAGS"] = f"{flags} --{FLAG}={int(watchdog_seconds) + MARGIN_SECONDS}".strip()


def gpu_libraries() -> list[Path]:
    """Returns the libraries of JAX that read XLA_FLAGS where there is a plugin for GPUs; none without it."""
    common, plugins = _files("jaxlib", "libjax_common.so"), _files("jax_plugins", "xla_cuda*/xla_cuda_plugin.so")
    return [*common, *plugins] if common and plugins else []


def _files(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return [file for folder in folders for file in Path(folder).glob(pattern)]


def _knows(library: Path) -> bool:
    """Returns True if the name of the flag is in a library."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(FLAG.encode()) >= 0
