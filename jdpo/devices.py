"""The kinds of devices that JAX looks for."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend

_VENDOR = "0x1ae0"
"""Google's vendor id of PCI devices."""

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
