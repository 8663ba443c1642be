"""Divides the devices of a host among the processes on it."""

from __future__ import annotations

import re
from collections.abc import Mapping

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def local_devices(environ: Mapping[str, str], index: int, num_processes: int) -> list[int] | None:
    """Returns the devices of a process.

    Args:
      environ: the environment of the process.
      index: index of the process among those on its host.
      num_processes: number of processes on its host.

    Returns:
      device numbers among the visible ones; None means all of them. A process that is alone on its host gets all. Of
      several, each gets an equal share of the visible devices in order, or the device with its own index if their
      number is unknown. A process that sees a single device gets that one: the launcher has already chosen.

    Raises:
      ValueError: the visible devices cannot be divided among the processes.
    """
    if num_processes <= 1:
        return None
    given = next((environ[name] for name in _VISIBLE if environ.get(name)), None)
    if given is None:
        return [index]
    num_visible = len(given.split(","))  # numbers or UUIDs: only how many there are matters
    if num_visible == 1:
        return None
    if num_visible % num_processes:
        raise ValueError(
            f"{num_visible} devices ({given}) cannot be divided among the {num_processes} processes of this host"
        )
    share = num_visible // num_processes
    return list(range(index * share, (index + 1) * share))


def tasks_of_node(environ: Mapping[str, str], count: int) -> int:
    """Returns the number of a Slurm or Open MPI job's `count` processes on this host; 1 if it is unknown."""
    if size := environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if tasks:  # such as 4(x2),1: four on each of two hosts, and one on the third
        per_node: list[int] = []
        for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
            per_node += [int(size)] * int(times or 1)
        node = int(environ.get("SLURM_NODEID") or 0)
        # For an unknown node, the largest count: shares may then be too small, but never overlap.
        return per_node[node] if node < len(per_node) else max(per_node)
    num_nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")
    return -(-count // int(num_nodes)) if num_nodes else 1
