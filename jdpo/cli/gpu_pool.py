"""The share of a GPU's memory that JAX reserves when it starts."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jdpo.chips import GPU_POOL

VARIABLE = "XLA_CLIENT_MEM_FRACTION"
"""Read by jaxlib when it starts a GPU client; XLA_PYTHON_CLIENT_MEM_FRACTION is its deprecated name."""

OWN_SETTINGS = (
    VARIABLE,
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
"""Variables by which a user decides about the pool."""

_DEVICE_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg", "dev/kfd")


def reserve_gpu_memory(
    environment: MutableMapping[str, str], root: Path = Path("/"), *, has_plugin: bool
) -> str | None:
    """Makes JAX reserve GPU_POOL of each GPU, unless the user has decided about that or there is no GPU.

    Call it before JAX looks for devices.

    Args:
      environment: the environment variables.
      root: the folder that contains `dev`.
      has_plugin: whether JAX has a plugin for GPUs, without which it runs on the CPU.

    Returns:
      a line for the user, or None where nothing was set.
    """
    own = any(environment.get(name) for name in OWN_SETTINGS)
    if own or not has_plugin or not may_use_gpu(environment, root):
        return None
    environment[VARIABLE] = str(GPU_POOL)
    return f"GPU memory: JAX reserves {GPU_POOL:.0%} of each GPU; set {VARIABLE} for another share (docs/devices.md)"


def may_use_gpu(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Returns True if this machine has a GPU that JAX may use."""
    platforms = environment.get("JAX_PLATFORMS") or "cuda"
    if not any(name in platforms for name in ("cuda", "rocm", "gpu")):
        return False
    # An empty list hides all GPUs, as does -1.
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any((root / file).exists() for file in _DEVICE_FILES)
