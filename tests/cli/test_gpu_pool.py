"""The command reserves most of a GPU's memory, unless the user has decided about it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from jaxlib import xla_client

from jdpo.chips import GPU_POOL
from jdpo.cli.gpu_pool import OWN_SETTINGS, VARIABLE, reserve_gpu_memory


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with an NVIDIA GPU."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    return tmp_path


def test_jax_gets_the_share_and_the_user_a_line(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"HOME": "/home/me"}
    note = reserve_gpu_memory(environment, machine, has_plugin=True)
    assert note is not None
    assert "92% of each GPU" in note
    assert environment[VARIABLE] == "0.92"
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    # What jaxlib itself makes of the variable, on this machine without a GPU.
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == GPU_POOL


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_a_setting_of_the_user_wins(machine: Path, name: str) -> None:
    assert name in inspect.getsource(xla_client.generate_pjrt_gpu_plugin_options), "jaxlib still reads it"
    environment = {name: "0.5"}
    assert reserve_gpu_memory(environment, machine, has_plugin=True) is None
    assert environment == {name: "0.5"}


@pytest.mark.parametrize(
    "hidden", [{"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}]
)
def test_nothing_is_set_where_no_gpu_is_used(machine: Path, tmp_path: Path, hidden: dict[str, str]) -> None:
    environment = dict(hidden)
    assert reserve_gpu_memory(environment, machine, has_plugin=True) is None
    assert reserve_gpu_memory({}, machine, has_plugin=False) is None
    assert reserve_gpu_memory({}, tmp_path / "other", has_plugin=True) is None
    assert environment == hidden
    assert reserve_gpu_memory({"JAX_PLATFORMS": "cuda,cpu"}, machine, has_plugin=True) is not None
