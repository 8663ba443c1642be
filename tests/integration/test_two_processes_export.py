"""Two processes on loopback load a model and write it together; what one refuses, both refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jdpo
from tests.integration.test_two_processes import free_port

PROGRAM = Path(__file__).parent / "two_processes_export.py"


def by_two(folder: Path, out: Path, case: str) -> list[tuple[int, str]]:
    """Exit code and stderr of both processes."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(out), case],
            env={
                **os.environ,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "PYTHONPATH": str(Path(jdpo.__file__).parents[1]),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    logs = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, log) for process, log in zip(processes, logs, strict=True)]


@pytest.mark.full
def test_two_processes_write_the_files_in_turn(toy_model: Path, tmp_path: Path) -> None:
    ends = by_two(toy_model, tmp_path / "out", "whole")
    assert [code for code, _ in ends] == [0, 0], ends
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    source = load_file(toy_model / "model.safetensors")
    assert index["weight_map"].keys() == source.keys()
    for name, file_name in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "out" / file_name)[name], source[name], err_msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_what_one_process_refuses_both_refuse(toy_model: Path, tmp_path: Path) -> None:
    ends = by_two(toy_model, tmp_path / "out", "damaged")
    assert [code for code, _ in ends] == [2, 2], ends
    said = [log for _, log in ends]
    assert sum("tensor model.norm.weight holds NaN or Inf: this model is not exported" in log for log in said) == 1
    assert sum("of this run has failed; its log says why" in log for log in said) == 1
    assert not list(tmp_path.iterdir())
    # NaN in a part that only the second process reads.
    damaged = Path(shutil.copytree(toy_model, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, -1] = np.nan
    save_file(tensors, damaged / "model.safetensors")
    ends = by_two(damaged, tmp_path / "out", "whole")
    assert [code for code, _ in ends] == [2, 2], ends
    said = [log for _, log in ends]
    assert any("tensor model.embed_tokens.weight in" in log and "holds NaN or Inf" in log for log in said)
    assert not (tmp_path / "out").exists()
