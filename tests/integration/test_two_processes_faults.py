"""An error of one process ends all processes of the run soon, and each reports which process failed and why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.cluster import run_cluster

DPO = ("-m", "jdpo.cli.main", "dpo")
SOON = 100
"""Seconds: JAX itself waits for 300 before a process that ended is missed."""


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 10_000)


def change(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))


@pytest.mark.full
@pytest.mark.parametrize(
    ("index", "damage", "message"),
    [
        (1, truncate, "model.safetensors is truncated"),
        (0, shutil.rmtree, "model folder './model' does not exist"),
    ],
)
def test_a_model_damaged_on_one_host_ends_both(
    run_words: Callable[..., list[str]],
    toy_model: Path,
    tmp_path: Path,
    index: int,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    hosts = [tmp_path / f"host_{host}" for host in range(2)]
    for host in hosts:
        shutil.copytree(toy_model, host / "model")
    damage(hosts[index] / "model")
    words = run_words(model_name_or_path="./model")
    ends = run_cluster([[*DPO, *words]] * 2, hosts, timeout=SOON)
    assert [end.code for end in ends] == [2, 2], ends
    assert message in ends[index].log
    other = ends[1 - index].log
    assert f"process {index} of this run has failed: " in other
    assert message in other


@pytest.mark.full
def test_models_that_differ_from_host_to_host_are_named(
    run_words: Callable[..., list[str]], toy_model: Path, tmp_path: Path
) -> None:
    hosts = [tmp_path / f"host_{host}" for host in range(2)]
    for host in hosts:
        shutil.copytree(toy_model, host / "model")
    change(hosts[1] / "model")
    ends = run_cluster([[*DPO, *run_words(model_name_or_path="./model")]] * 2, hosts, timeout=SOON)
    assert [end.code for end in ends] == [2, 2], ends
    for end in ends:
        assert "the model ./model differ from host to host" in end.log


@pytest.mark.full
def test_an_output_dir_in_use_ends_both(run_words: Callable[..., list[str]], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ends = run_cluster([[*DPO, *run_words()]] * 2, timeout=SOON)
    assert [end.code for end in ends] == [2, 2], ends
    for end in ends:
        assert "is in use by" in end.log


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_that_the_other_cannot_notice_ends_it_too(index: int) -> None:
    ends = run_cluster([[Path(__file__).parent / "fail_alone.py", index]] * 2, timeout=SOON)
    assert [end.code for end in ends] == [1, 1], ends
    assert "OSError: the disk has gone" in ends[index].log
    waited = f"process {index} of this run has failed"
    assert waited in ends[1 - index].log
