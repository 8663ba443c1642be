"""Every kind of cluster is joined as its launcher describes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.processes import Membership, find_cluster, join_cluster

HERE = Path(__file__).parent
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "PMI", "TPU_", "MEGASCALE_", "KUBERNETES_", "CUDA_VISIBLE", "JOB_COMPLETION")

TORCHRUN = {
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[03-06]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


class Recorder:
    """Records calls instead of `jax.distributed.initialize`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, heartbeat_timeout_seconds: int) -> None:
        self.calls.append(args)


def joined(environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Returns the calls of `initialize` under an environment: address, count, index, local_device_ids."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in environ.items():  # JAX's own detection reads os.environ
        monkeypatch.setenv(name, value)
    recorder, lines = Recorder(), list[str]()
    found = join_cluster(environ=environ, initialize=recorder, log=lines.append)
    assert len(lines) == (0 if found is None else 1)
    return recorder.calls


SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "call"),
    [
        pytest.param(BY_HAND, ("node0:1234", 2, 1, None), id="by hand"),
        pytest.param(BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, ("node0:1234", 2, 1, [2, 3]), id="with devices"),
        pytest.param(BY_HAND | TORCHRUN | SLURM, ("node0:1234", 2, 1, None), id="by hand before all others"),
        pytest.param(TORCHRUN, ("node0:29500", 8, 5, [1]), id="torchrun"),
        pytest.param(TORCHRUN | SLURM, ("node0:29500", 8, 5, [1]), id="torchrun within Slurm"),
        pytest.param(
            TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            ("node0:29501", 8, 5, [1]),
            id="torchrun listens at its port",
        ),
        pytest.param(
            TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "fd00::1"},
            ("[fd00::1]:29500", 8, 5, None),
            id="torchrun with one process per host",
        ),
        pytest.param(
            TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            ("node0:29500", 8, 5, [4, 5, 6, 7]),
            id="torchrun with four devices per process",
        ),
        pytest.param(SLURM, ("node03:61444", 4, 2, None), id="Slurm with one task per host"),
        pytest.param(
            SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"},
            ("node03:61444", 4, 2, [0]),
            id="Slurm with two tasks per host",
        ),
        pytest.param(
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "CUDA_VISIBLE_DEVICES": "3"},
            ("node03:61444", 4, 2, None),
            id="Slurm gives each task its device",
        ),
        pytest.param(SLURM | {"JAX_COORDINATOR_PORT": "7000"}, ("node03:7000", 4, 2, None), id="a port by hand"),
        pytest.param(OPEN_MPI, ("10.96.0.1:62624", 4, 3, [1]), id="Open MPI"),
    ],
)
def test_clusters_are_joined(environ: dict[str, str], call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(environ, monkeypatch) == [call]


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="nothing set"),
        pytest.param({"JAX_NUM_PROCESSES": "1"} | SLURM, id="one by hand"),
        pytest.param({"WORLD_SIZE": "1", "RANK": "0"}, id="torchrun"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, id="Slurm"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, id="Open MPI"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, id="a pod that belongs to no job"),
        pytest.param({"MASTER_ADDR": "node0", "RANK": "3"}, id="no count of processes"),
    ],
)
def test_a_single_process_joins_nothing(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(environ, monkeypatch) == []


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "missing: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (BY_HAND | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "node0"}, "expected HOST:PORT"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "node0:70000"}, "expected HOST:PORT"),
        ({"WORLD_SIZE": "8", "RANK": "1"}, "missing: MASTER_ADDR, MASTER_PORT"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, "srun jdpo"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "srun jdpo"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}, r"JAX_NUM_PROCESSES=\$OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, r"JAX_NUM_PROCESSES=\$PMI_SIZE"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, "names 3 processes"),
        (SLICES | {"TPU_WORKER_HOSTNAMES": "a"}, "names 2 processes"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID is not set"),
        (SLICES | {"MEGASCALE_SLICE_ID": "2"}, "numbered from 0"),
        ({"MEGASCALE_SLICE_ID": "1"}, "MEGASCALE_NUM_SLICES is not set"),
        (SLICES | {"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES is 'two'"),
        (SLICES | BY_HAND | {"JAX_NUM_PROCESSES": "3"}, "3 processes: every slice needs"),
        (SLICES | {"JAX_NUM_PROCESSES": "1"}, "1 process: every slice needs"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "JAX_COORDINATOR_ADDRESS"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "cannot be divided"),
    ],
)
def test_settings_that_would_train_alone_or_wait_for_ever_are_refused(
    environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        joined(environ, monkeypatch)


def test_the_slices_of_a_config_and_of_the_environment_must_agree_before_anything_waits() -> None:
    recorder = Recorder()

    def join(environ: dict[str, str], slices: int | None) -> int:
        # The coordinator's name does not resolve: detecting it would wait for minutes.
        environ = {"TPU_WORKER_HOSTNAMES": "no.such.host,b"} | environ if slices == 4 else environ
        join_cluster(slices=slices, environ=environ, initialize=recorder, log=lambda line: None)
        return len(recorder.calls)

    with pytest.raises(ValueError, match=r"mesh\.slices is 4, but MEGASCALE_NUM_SLICES is 2"):
        join(SLICES, 4)
    assert recorder.calls == []
    assert join(BY_HAND | SLICES, 2) == 1
    assert join(BY_HAND | SLICES, None) == 2
    # Only libtpu reads these variables: a run on the CPUs of a TPU VM is not on slices.
    assert join(BY_HAND | SLICES | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "3"}, 3) == 3


def test_a_jax_that_keeps_its_detection_elsewhere_is_named_where_there_may_be_a_cluster() -> None:
    def moved() -> Any:
        raise AttributeError("ClusterEnv has no attribute '_cluster_types'")

    with pytest.raises(ValueError, match=r"cannot be detected.*_cluster_types"):
        find_cluster(SLURM, moved)
    assert find_cluster({}, moved) is None


def test_a_detection_that_fails_says_what_to_set() -> None:
    class Pod:
        @classmethod
        def is_env_present(cls) -> bool:
            raise ConnectionRefusedError("metadata server")

    with pytest.raises(ValueError, match=r"metadata server.*JAX_NUM_PROCESSES"):
        find_cluster({}, lambda: [Pod])


def test_the_line_names_source_place_and_devices() -> None:
    assert str(Membership("Slurm", "node0:1234", 4, 2, [0, 1])) == (
        "Slurm: process 2 of 4, with device 0, 1 of its host; process 0 is at node0:1234"
    )
    assert "all devices of its host" in str(Membership("Slurm", "node0:1234", 4, 2))


def test_tpu_pods_are_joined() -> None:
    """Runs a separate process whose JAX sees a TPU VM with a metadata server."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environ |= {"PYTHONPATH": str(Path(jdpo.__file__).parents[1]), "JAX_FORCE_TPU_INIT": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, HERE / "tpu_pods.py"], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "GKE, one slice of two hosts": ["127.0.0.1:8482", 2, 1, None],
        "GKE, addresses of processes": ["127.0.0.1:8482", 3, 2, None],
        "GKE, two slices of one host": ["127.0.0.1:8482", 2, 1, None],
        "GKE, one host": None,
        "GCE, two hosts, nothing set": ["127.0.0.1:8482", 2, 1, None],
        "GCE, two slices of two hosts": ["127.0.0.1:8482", 4, 3, None],
        "GCE, one host": None,
    }
