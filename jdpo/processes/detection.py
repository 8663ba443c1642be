"""Finds the cluster that a launcher describes in the environment of a process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from typing import Any, NamedTuple

from jdpo.processes.local_devices import local_devices, tasks_of_node

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_SET_BY_HAND = (
    "set JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for every process"
)
_ONE_PROCESS = "For a run of a single process, set JAX_NUM_PROCESSES=1"
_DETECTION_SECONDS = 300
"""Time limit for JAX to find the host of process 0; this is also JAX's default."""


class Membership(NamedTuple):
    """The place of this process in a cluster.

    Attributes:
      source: the launcher or the variables that describe the cluster.
      coordinator_address: host:port at which process 0 listens; "" for a single process.
      num_processes: number of processes in the cluster.
      process_id: index of this process.
      local_device_ids: devices of the host that belong to this process; None means all of them.
    """

    source: str
    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None

    def __str__(self) -> str:
        if self.num_processes == 1:
            return f"{self.source}: a single process"
        ids = self.local_device_ids
        devices = "all devices of its host" if ids is None else f"device {', '.join(map(str, ids))} of its host"
        place = f"process {self.process_id} of {self.num_processes}, with {devices}"
        return f"{self.source}: {place}; process 0 is at {self.coordinator_address}"


def find_cluster(
    environ: Mapping[str, str], environments: Callable[[], Sequence[Any]] | None = None
) -> Membership | None:
    """Finds the cluster that this process belongs to.

    Looks for JAX's three variables, for torchrun's four, for the clusters that JAX itself detects (Open MPI, Slurm, TPU
    pods on GKE and GCE), and for an indexed Kubernetes job, in this order.

    Args:
      environ: the environment of this process. JAX's own detection reads os.environ.
      environments: returns JAX's cluster environments. Default: those of the installed JAX.

    Returns:
      the place of this process; None if nothing describes a cluster.

    Raises:
      ValueError: the description is incomplete, or names more processes than would be joined.
    """
    found = _by_hand(environ)
    if found is not None:
        return found  # set by hand, so it overrides everything else in the environment
    found = _torchrun(environ)
    if found is None:
        _check_slurm_step(environ)
        found = _detected(environ, environments or jax_environments)
    if found is None or found.num_processes == 1:
        _check_none_missed(environ, found)
    return found


def _by_hand(environ: Mapping[str, str]) -> Membership | None:
    address, count, index = (environ.get(name) for name in BY_HAND)
    if _number(environ, "JAX_NUM_PROCESSES") == 1:
        return Membership("JAX_NUM_PROCESSES", "", 1, 0)
    if not (address or count or index):
        return None
    _require(environ, BY_HAND)
    ids = environ.get("JAX_LOCAL_DEVICE_IDS")
    return _checked(
        "JAX_COORDINATOR_ADDRESS",
        str(address),
        _number(environ, "JAX_NUM_PROCESSES"),
        _number(environ, "JAX_PROCESS_ID"),
        [int(each) for each in ids.split(",")] if ids else None,
    )


def _torchrun(environ: Mapping[str, str]) -> Membership | None:
    # Kubernetes sets names like these for services; only a count of processes makes them a cluster.
    if not environ.get("WORLD_SIZE"):
        return None
    count = _number(environ, "WORLD_SIZE")
    if count == 1:
        return Membership("torchrun", "", 1, 0)
    _require(environ, _TORCHRUN)
    port = _number(environ, "MASTER_PORT")
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += 1 if port < 65535 else -1  # torchrun itself listens at MASTER_PORT
    address = f"{_bracketed(environ['MASTER_ADDR'])}:{environ.get('JAX_COORDINATOR_PORT') or port}"
    ids = local_devices(environ, _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE", 1))
    return _checked("torchrun", address, count, _number(environ, "RANK"), ids)


def _check_slurm_step(environ: Mapping[str, str]) -> None:
    """Refuses a job of several tasks if this process is not one of them: srun starts tasks, sbatch does not."""
    num_tasks = _number(environ, "SLURM_NTASKS", 1)
    in_step = "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
    if num_tasks > 1 and not (in_step and _number(environ, "SLURM_STEP_NUM_TASKS", num_tasks) == num_tasks):
        raise ValueError(
            f"this Slurm job has {num_tasks} tasks (SLURM_NTASKS), but this process is not one of them: start it with "
            f"`srun jdpo ...` instead of `jdpo ...`. {_ONE_PROCESS}"
        )


def jax_environments() -> Sequence[Any]:
    """Returns the cluster environments that JAX knows, in its order.

    Raises:
      ImportError, AttributeError: this version of JAX has them in another place.
    """
    import jax._src.clusters  # defines the environments; there is no public name

    return list(jax._src.clusters.ClusterEnv._cluster_types)


def _detected(environ: Mapping[str, str], environments: Callable[[], Sequence[Any]]) -> Membership | None:
    try:
        candidates = environments()
    except (ImportError, AttributeError) as error:
        # Without any sign of a cluster, a run of one process needs no detection.
        if _named_counts(environ) or "JOB_COMPLETION_INDEX" in environ or glob("/dev/accel*"):
            raise ValueError(
                f"the cluster cannot be detected: this version of JAX does it in another place ({error}). Please "
                f"{_SET_BY_HAND}. {_ONE_PROCESS}"
            ) from None
        return None
    for environment in candidates:
        if environment.__name__ == "K8sCluster":
            if "JOB_COMPLETION_INDEX" not in environ:  # an ordinary Kubernetes pod, without a cluster to join
                continue
            _check_kubernetes()
        # Such as mpi4py, which JAX uses only on request: merely being installed does not describe a cluster.
        elif getattr(environment, "opt_in_only_method", False):
            continue
        try:
            if environment.is_env_present():
                return _described_by(environment, environ)
        except Exception as error:  # of the network, a metadata server, or a name that does not resolve
            name = _source(environment)
            raise ValueError(
                f"this looks like a cluster of {name}, but JAX cannot find its processes "
                f"({type(error).__name__}: {error}). Fix that, or {_SET_BY_HAND}. {_ONE_PROCESS}"
            ) from error
    return None


def _check_kubernetes() -> None:
    from importlib.util import find_spec

    if find_spec("kubernetes") is None:
        raise ValueError(
            "this is a pod of an indexed Kubernetes job (JOB_COMPLETION_INDEX), whose number of pods is not known: "
            f"install the package `kubernetes`, or {_SET_BY_HAND}. {_ONE_PROCESS}"
        )


def _described_by(environment: Any, environ: Mapping[str, str]) -> Membership:
    source, count = _source(environment), int(environment.get_process_count())
    if count == 1:
        return Membership(source, "", 1, 0)
    address = environment.get_coordinator_address(
        timeout_secs=_DETECTION_SECONDS, override_coordinator_port=environ.get("JAX_COORDINATOR_PORT")
    )
    ids = None
    if (local_index := environment.get_local_process_id()) is not None:
        # JAX would use device `local_index` only, even if this is the only process on a host with eight devices.
        ids = local_devices(environ, int(local_index), tasks_of_node(environ, count))
    return _checked(source, address, count, int(environment.get_process_id()), ids)


def _source(environment: Any) -> str:
    names = {
        "OmpiCluster": "Open MPI",
        "SlurmCluster": "Slurm",
        "GkeTpuCluster": "TPU pods on GKE",
        "GceTpuCluster": "TPU pods on GCE",
        "K8sCluster": "Kubernetes",
    }
    return names.get(environment.__name__, environment.__name__)


def _named_counts(environ: Mapping[str, str]) -> dict[str, int]:
    """Returns the variables that name more than one process, with the number of processes."""
    # Text that is not a number belongs to another program with such a variable, and does not count.
    numbers = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MEGASCALE_NUM_SLICES")
    counts = {name: int(environ.get(name) or 1) for name in numbers if re.fullmatch(r"\d*", environ.get(name, ""))}
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        counts[name] = len(environ.get(name, "").split(","))
    return {name: count for name, count in counts.items() if count > 1}


def _check_none_missed(environ: Mapping[str, str], found: Membership | None) -> None:
    # Processes that each train alone look like a successful run, so a count that nothing used is an error.
    for name, count in _named_counts(environ).items():
        by = f"{found.source} describes a single process" if found else "JAX does not detect the cluster"
        example = ""
        if name == "OMPI_COMM_WORLD_SIZE":
            example = ", such as JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK"
        elif name == "PMI_SIZE":
            example = ", such as JAX_NUM_PROCESSES=$PMI_SIZE JAX_PROCESS_ID=$PMI_RANK"
        raise ValueError(
            f"{name}={environ[name]} names {count} processes, but {by}, and each process would train alone. Please "
            f"{_SET_BY_HAND}{example}. {_ONE_PROCESS}"
        )


def _require(environ: Mapping[str, str], names: Sequence[str]) -> None:
    if missing := [name for name in names if not environ.get(name)]:
        raise ValueError(
            f"a run over several processes needs {', '.join(names)}; missing: {', '.join(missing)}. {_ONE_PROCESS}"
        )


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    if not (text := environ.get(name, "").strip()):
        return default
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name} is {text!r}; expected a whole number")
    return int(text)


def _checked(source: str, address: str, count: int, index: int, ids: list[int] | None) -> Membership:
    if not 0 <= index < count:
        raise ValueError(f"{source}: process {index} of {count}; processes are numbered from 0 to {count - 1}")
    port = address.rpartition(":")[2]
    if not (re.fullmatch(r".+:\d+", address) and 0 < int(port) < 2**16):
        raise ValueError(f"{source}: the address of process 0 is {address!r}; expected HOST:PORT")
    return Membership(source, address, count, index, ids)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host  # IPv6: its colons would run into the port
