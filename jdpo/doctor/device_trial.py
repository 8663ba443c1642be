"""The trial of the devices: JAX finds them, and a sum over all of them is right."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdpo.config import TrainConfig
from jdpo.devices import may_have_tpu
from jdpo.doctor.process_facts import DeviceFacts
from jdpo.doctor.time_limit import TimeLimits
from jdpo.sharding.axes import AXES
from jdpo.sharding.mesh import check_batch_size, make_mesh

_FLAG_SECONDS = 60.0
_PARSE_FLAGS = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def flag_error(environ: Mapping[str, str]) -> str | None:
    """Returns what is wrong with XLA_FLAGS, or None.

    XLA aborts a process with a flag that it does not know, so another process tries them.
    """
    if not environ.get("XLA_FLAGS"):
        return None
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _PARSE_FLAGS], env=dict(environ), capture_output=True, timeout=_FLAG_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # nothing is known about the flags then, and JAX will tell
    found = re.search(r"Unknown flags? in XLA_FLAGS: *(.*)", tried.stderr.decode(errors="replace"))
    return None if tried.returncode == 0 or found is None else f"XLA does not know {found[1].strip()}"


def find_devices(config: TrainConfig | None, limits: TimeLimits, seconds: float) -> DeviceFacts:
    """Lets JAX find the devices, which all processes of a cluster have to do together, and lays out the mesh."""
    try:
        local = limits.run("devices", seconds, jax.local_devices)
    except TimeoutError as error:
        return DeviceFacts(error=str(error), waited=True)
    except Exception as error:  # RuntimeError of JAX, and whatever plugins raise
        return DeviceFacts(error=f"{type(error).__name__}: {error}", waited="DEADLINE_EXCEEDED" in str(error))
    platform = local[0].platform
    mesh, mesh_error = "", None
    if config is not None:
        try:
            made = make_mesh(config.mesh)
            check_batch_size(config.global_batch_size, made)
            mesh = " x ".join(f"{axis} {made.shape[axis]}" for axis in made.axis_names if axis in AXES)
        except ValueError as error:
            mesh_error = str(error)
    return DeviceFacts(
        platform=platform,
        kinds=tuple(device.device_kind for device in local),
        num_all=jax.device_count(),
        unused=unused_accelerators(platform, os.environ, Path("/")),
        mesh=mesh,
        mesh_error=mesh_error,
    )


def unused_accelerators(platform: str, environ: Mapping[str, str], root: Path) -> str:
    """Returns the accelerators of this host that JAX does not use although nothing tells it not to, in words.

    Args:
      platform: the platform that JAX uses.
      environ: the environment variables.
      root: the folder that contains `dev` and `sys`.
    """
    if platform != "cpu" or environ.get("JAX_PLATFORMS"):
        return ""
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if not hidden and (found := glob.glob(str(root / "dev/nvidia[0-9]*"))):
        return f"{len(found)} NVIDIA (dev/nvidia0); install jdpo[cuda]"
    return "a TPU; install jdpo[tpu]" if may_have_tpu({}, root, asked=None) else ""


def sum_over_all(facts: DeviceFacts, limits: TimeLimits, seconds: float) -> DeviceFacts:
    """Adds the result of a psum over all devices of all processes; a device with the number i contributes i + 1."""
    try:
        sums, taken = limits.run("psum", seconds, _sum_twice)
    except TimeoutError as error:
        return dataclasses.replace(facts, sum_error=str(error))
    except Exception as error:
        return dataclasses.replace(facts, sum_error=f"{type(error).__name__}: {error}")
    return dataclasses.replace(facts, sums=sums, sum_seconds=taken)


def _sum_twice() -> tuple[tuple[float, ...], float]:
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("devices",))
    # float32 adds whole numbers exactly up to 2**24, which 5,000 devices do not reach.
    numbers = np.arange(1, devices.size + 1, dtype=np.float32)
    mine = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("devices")), lambda index: numbers[index]
    )
    total = jax.jit(
        jax.shard_map(
            lambda part: jax.lax.psum(part, "devices"),
            mesh=mesh,
            in_specs=PartitionSpec("devices"),
            out_specs=PartitionSpec(),
        )
    )
    total(mine).block_until_ready()  # compiles, and opens the connections between devices
    begin = time.monotonic()
    result = total(mine).block_until_ready()
    taken = time.monotonic() - begin
    return tuple(float(np.asarray(shard.data)[0]) for shard in result.addressable_shards), taken
