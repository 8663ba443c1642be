"""libtpu is loaded only if there may be a TPU, and programs may be made for other devices than this machine has."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jdpo.devices import Target, compiling_for, may_have_tpu, target
from jdpo.models.self_attention import AttentionSettings
from tests.conftest import small_llama

ROOT = Path(__file__).resolve().parents[1]


def pci(root: Path, vendor: str) -> None:
    folder = root / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")


def test_a_tpu_is_looked_for_where_there_may_be_one(tmp_path: Path) -> None:
    assert not may_have_tpu({}, tmp_path, asked=None)
    assert may_have_tpu({}, tmp_path, asked="tpu,cpu")
    assert may_have_tpu({"TPU_NAME": "mine"}, tmp_path, asked=None)
    pci(tmp_path / "other", "0x10de")
    assert not may_have_tpu({}, tmp_path / "other", asked=None)
    pci(tmp_path / "google", "0x1ae0")
    assert may_have_tpu({}, tmp_path / "google", asked=None)
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # every machine with the driver has this file
    assert not may_have_tpu({}, tmp_path, asked=None)
    (tmp_path / "dev" / "vfio" / "0").touch()
    assert may_have_tpu({}, tmp_path, asked=None)


LIBTPU = """
import sys

def get_library_path():
    print("libtpu is asked for", file=sys.stderr)
    return "/no/libtpu.so"
"""
CODE = """
import sys
import jax  # which asks for the library's path once, without loading it
print("imported", file=sys.stderr)
from jdpo.devices import leave_out_missing_tpus
leave_out_missing_tpus()
print(jax.default_backend())
"""


@pytest.mark.full
@pytest.mark.skipif(may_have_tpu({}, Path("/"), asked=None), reason="this machine has a TPU")
@pytest.mark.parametrize("platforms", ["", "tpu"])
def test_without_a_tpu_libtpu_is_not_loaded_unless_it_is_asked_for(tmp_path: Path, platforms: str) -> None:
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").write_text(LIBTPU)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    environment |= {"JAX_PLATFORMS": platforms, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    warnings = done.stderr.partition("imported")[2]
    assert ("libtpu is asked for" in warnings) == (platforms == "tpu")
    assert (done.returncode == 0) == (platforms == "")
    if platforms:
        assert "Unable to initialize backend 'tpu'" in warnings


def test_programs_may_be_made_for_other_devices() -> None:
    assert target() == Target(jax.default_backend())
    with compiling_for(Target("gpu", "8.0")):
        assert target() == Target("gpu", "8.0")
        assert AttentionSettings().resolve("bfloat16", small_llama(), 2048, None) == "cudnn"
        with_sinks = dataclasses.replace(small_llama(), attention_sinks=True)
        assert AttentionSettings().resolve("bfloat16", with_sinks, 2048, None) == "blockwise"
        with compiling_for(Target("tpu")):
            assert AttentionSettings().resolve("bfloat16", small_llama(), 2048, None) == "splash"
    assert target() == Target(jax.default_backend())
