"""Options of the compiler: what reaches it, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import jax
import pytest

from jdpo.config import DPOConfig, MeshConfig, load_config
from jdpo.devices import compiling_for
from jdpo.planning.compile_only import compile_only_devices, missing_package
from jdpo.planning.machines import machine_of
from jdpo.sharding.mesh import make_mesh
from jdpo.training.fit.compiler_options import OPTIONS, compiler_options, options_of

ACCEPTED = {"xla_cpu_enable_fast_math": False, "xla_backend_optimization_level": 1}


@pytest.fixture
def mesh() -> Any:
    return make_mesh(MeshConfig(), jax.devices()[:2])


def test_options_that_the_compiler_takes_are_kept(mesh: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert compiler_options(mesh, ACCEPTED) == ACCEPTED
    assert not caplog.records


def test_options_for_gpus_exist_in_this_version_of_xla(mesh: Any) -> None:
    # XLA knows the options of GPUs wherever it runs; those of TPUs are known to libtpu alone.
    assert compiler_options(mesh, OPTIONS["gpu"]) == OPTIONS["gpu"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["v5e-8", "v5p-8", "v6e-8", "tpu7x-8"])
def test_options_for_tpus_exist_in_this_version_of_libtpu(name: str) -> None:
    machine = machine_of(name)
    if missing := missing_package(machine):
        pytest.skip(f"{missing} is not installed")
    with compiling_for(machine.target):
        mesh = make_mesh(MeshConfig(), compile_only_devices(machine))
        assert options_of(mesh)
        assert compiler_options(mesh) == options_of(mesh)


def test_each_option_that_the_compiler_refuses_is_left_out_and_named_in_a_line(
    mesh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # One name is the beginning of the other, and a value is not of the option's type.
    unknown = {"xla_cpu_enable_fast": True, "xla_made_up": 3}
    with caplog.at_level(logging.WARNING):
        assert compiler_options(mesh, unknown | {"xla_dump_hlo_as_text": "seven"} | ACCEPTED) == ACCEPTED
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for name in (*unknown, "xla_dump_hlo_as_text"):
        (line,) = [line for line in lines if line.startswith(f"compiler option {name}=")]
        assert "\n" not in line


def test_a_config_replaces_options_of_the_devices_kind_and_takes_them_away(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(OPTIONS, kind, {"xla_cpu_enable_fast_math": True, "xla_backend_optimization_level": 2})
    words = ["datasets=x", "model_name_or_path=x", "output_dir=x"]
    config = load_config(DPOConfig, None, [*words, "compiler_options={xla_backend_optimization_level: 1}"])
    assert compiler_options(mesh, config.compiler_options) == {
        "xla_cpu_enable_fast_math": True,
        "xla_backend_optimization_level": 1,
    }
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    assert compiler_options(alone, config.compiler_options) == {"xla_backend_optimization_level": 1}
    config = load_config(DPOConfig, None, [*words, "compiler_options={xla_cpu_enable_fast_math: null}"])
    assert compiler_options(mesh, config.compiler_options) == {"xla_backend_optimization_level": 2}
