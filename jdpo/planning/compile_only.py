"""Devices that programs are compiled for and cannot run on: no TPU, GPU or driver is needed.

The compiler for TPUs is in the package libtpu, the one for GPUs in `jax[cuda13]`; neither is needed to train on CPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax

from jdpo.config import MeshConfig
from jdpo.planning.machines import Machine

_GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0" device_address_bits: 64 name: "{name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
"""A Hopper GPU as XLA's `GpuTargetConfigProto` in text form; both that are known have the same 132 cores."""


def missing_package(machine: Machine) -> str | None:
    """Returns what is not installed that compiles for a machine, or None if it is there."""
    if machine.is_gpu:
        return None if importlib.util.find_spec("jax_cuda13_plugin") else "jax[cuda13]"
    return None if importlib.util.find_spec("libtpu") else "libtpu"


def compile_only_devices(machine: Machine) -> list[Any]:
    """Returns the devices of a machine for `jax.sharding.Mesh`, without that machine.

    Raises:
      ValueError: the compiler is not installed, or does not know the machine.
    """
    missing = missing_package(machine)
    if missing is not None:
        raise ValueError(
            f"compiling for {machine.name} needs {missing}, which is not installed here; `pip install '{missing}'` "
            "adds it, and it needs no such device (benchmarks/README.md has an environment with all compilers)"
        )
    from jax.experimental import topologies

    # For a TPU: other processes may compile at the same time, and no server of a cloud is asked which TPU this is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if machine.is_gpu:
            description = topologies.get_topology_desc(
                platform="cuda", target_config=_gpu_description(machine), topology=machine.topology
            )
        else:
            slices = {"num_slices": machine.slices} if machine.slices > 1 else {}
            with _as_on_a_tpu_vm():
                description = topologies.get_topology_desc(machine.topology, platform="tpu", **slices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"the installed compiler knows no {machine.name} ({error})") from error
    devices = list(description.devices)
    assert len(devices) == machine.num_devices, (machine, len(devices))
    return devices


def on_nodes(mesh: MeshConfig, machine: Machine) -> MeshConfig:
    """Returns a mesh with the number of a machine's nodes of GPUs as `slices`, where it leaves that open.

    Real GPUs have their node as `slice_index`; those that programs are only compiled for do not.
    """
    if not machine.is_gpu or machine.slices == 1 or mesh.slices is not None:
        return mesh
    return dataclasses.replace(mesh, slices=machine.slices)


_TPU_VM = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


@contextlib.contextmanager
def _as_on_a_tpu_vm() -> Iterator[None]:
    """Tells libtpu, as it is loaded, what it would ask a TPU VM for: where there is none, it writes warnings.

    Programs do not depend on it: the topology is asked for by name.
    """
    missing = {name: value for name, value in _TPU_VM.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:  # real devices may be looked for later
            del os.environ[name]


def _gpu_description(machine: Machine) -> str:
    chip = machine.chip
    return _GPU_DESCRIPTION.format(
        name=machine.kind, memory=int(chip.hbm_bytes), bandwidth=int(chip.hbm_bandwidth)
    ).strip()


@contextlib.contextmanager
def without_cudnn_checks() -> Iterator[None]:
    """Lets JAX lower cuDNN's attention where no cuDNN and no GPU is: it asks this machine's for their versions.

    The programs are compiled for cuDNN 9.10 and a Hopper GPU, whose limits `jdpo.models.attention.choose` checks.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    module: Any = fused
    before = module.check_cudnn_version, module.check_compute_capability
    module.check_cudnn_version = lambda *_, **__: 91000
    module.check_compute_capability = lambda *_, **__: True
    try:
        yield
    finally:
        module.check_cudnn_version, module.check_compute_capability = before
