"""Which kinds of devices JAX looks for."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend

_VENDOR = "0x1ae0"
"""Google's number among makers of PCI devices."""

_ASKED_FOR = ("JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Variables of the environment that only somebody sets who has a TPU, here or elsewhere."""


def leave_out_missing_tpus() -> None:
    """Keeps JAX from loading libtpu where the machine has no TPU, as it would fill the terminal with warnings.

    Call it before anything touches a device. Where a TPU is there or is asked for (`JAX_PLATFORMS=tpu`), nothing
    changes, and what libtpu has to say is seen.
    """
    if not may_have_tpu(os.environ, Path("/"), asked=jax.config.jax_platforms):

        def missing() -> Any:
            raise RuntimeError("this machine has no TPU")

        try:
            jax.extend.backend.register_backend_factory("tpu", missing, priority=300, fail_quietly=True)
        except RuntimeError:  # JAX has a TPU already
            return


def may_have_tpu(environment: Mapping[str, str], root: Path, *, asked: str | None) -> bool:
    """Returns whether JAX should look for a TPU.

    Args:
      environment: variables of this process.
      root: where `/sys` and `/dev` are.
      asked: the platforms that JAX was told to use, None where it may choose.
    """
    if asked or any(environment.get(name) for name in _ASKED_FOR):
        return True
    if list(root.glob("dev/accel*")) or list(root.glob("dev/vfio/[0-9]*")):
        return True
    vendors = (Path(path) for path in glob.glob(str(root / "sys/bus/pci/devices/*/vendor")))
    return any(path.read_text(encoding="ascii", errors="replace").strip() == _VENDOR for path in vendors)
