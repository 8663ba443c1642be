"""The kinds of devices that JAX looks for, and the kind that programs are made for."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.backend

_VENDOR = "0x1ae0"
"""Google's vendor id of PCI devices."""


class Target(NamedTuple):
    """The kind of devices that programs are made for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: of an NVIDIA GPU, such as "9.0"; another text for a GPU that is not NVIDIA's; else None.
    """

    platform: str
    compute_capability: str | None = None


_compiling_for: Target | None = None


def target() -> Target:
    """Returns the kind of devices that programs are made for: this process's own, unless it compiles for others.

    Code that chooses by platform while a program is traced asks here, and not `jax.default_backend()`: a program for a
    TPU may be compiled on a machine without one.
    """
    if _compiling_for is not None:
        return _compiling_for
    platform = jax.default_backend()
    if platform != "gpu":
        return Target(platform)
    device = jax.local_devices()[0]
    # The platform is "gpu" for NVIDIA and AMD; JAX itself distinguishes them by the client's version.
    is_nvidia = "cuda" in device.client.platform_version
    return Target(platform, str(device.compute_capability) if is_nvidia else "ROCm")


@contextlib.contextmanager
def compiling_for(other: Target) -> Iterator[None]:
    """Makes `target` return another kind of devices, in all threads: for programs that are compiled and not run."""
    global _compiling_for
    before, _compiling_for = _compiling_for, other
    try:
        yield
    finally:
        _compiling_for = before


_ASKED_FOR = ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Environment variables that are set only by users of a TPU, on this machine or a remote one."""


def leave_out_missing_tpus() -> None:
    """Keeps JAX from loading libtpu on a machine without a TPU, where it would fill the terminal with warnings.

    Call it before anything touches a device. If there is a TPU, or one is requested (`JAX_PLATFORMS=tpu`), nothing
    changes, and the messages of libtpu are shown.
    """
    # Asking JAX would load libtpu; device files and PCI ids show a TPU as well.
    config: Any = jax.config  # its values have no annotations
    if not may_have_tpu(os.environ, Path("/"), asked=config.jax_platforms):

        def missing() -> Any:
            raise RuntimeError("this machine has no TPU")

        try:
            # In place of JAX's own factory, with its priority: this one fails at once, without loading libtpu.
            jax.extend.backend.register_backend_factory("tpu", missing, priority=300, fail_quietly=True)
        except RuntimeError:  # JAX has already found a TPU
            return


def may_have_tpu(environment: Mapping[str, str], root: Path, *, asked: str | None) -> bool:
    """Returns whether JAX should look for a TPU.

    Args:
      environment: the environment variables.
      root: the folder that contains `sys` and `dev`.
      asked: the platforms that JAX was told to use; None: it may choose.
    """
    if asked or any(environment.get(name) for name in _ASKED_FOR):
        return True
    if list(root.glob("dev/accel*")) or list(root.glob("dev/vfio/[0-9]*")):
        return True
    vendors = (Path(path) for path in glob.glob(str(root / "sys/bus/pci/devices/*/vendor")))
    return any(path.read_text(encoding="ascii", errors="replace").strip() == _VENDOR for path in vendors)
