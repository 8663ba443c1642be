"""The launchers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.launch.host import HostOptions, host
from jdpo.launch.jobset import JobSetOptions, jobset
from jdpo.launch.launched import Launch
from jdpo.launch.request import LaunchRequest
from jdpo.launch.skypilot import SkyPilotOptions, skypilot
from jdpo.launch.slurm import SlurmOptions, slurm
from jdpo.launch.tpu_vm import TpuVmOptions, tpu_vm
from jdpo.words import did_you_mean


class Launcher(NamedTuple):
    """A way to start a run.

    Attributes:
      summary: what it is, for the help.
      example: the words of a command line, after its name, for the help.
      options: the dataclass of its options, see `jdpo.launch.launch_options`.
      launch: makes files and commands of a request and these options. It raises ValueError for a machine that this
        launcher cannot start, or settings that it cannot keep.
    """

    summary: str
    example: str
    options: type
    launch: Callable[[LaunchRequest, Any], Launch]


LAUNCHERS: dict[str, Launcher] = {
    "jobset": Launcher(
        "JobSet on Kubernetes, with TPUs or GPUs of GKE",
        "run.yaml --on 2xv5e-16 --image IMAGE --volume CLAIM",
        JobSetOptions,
        jobset,
    ),
    "slurm": Launcher(
        "batch job of a Slurm cluster, on nodes of GPUs",
        "run.yaml --on h100x16 --time 24:00:00",
        SlurmOptions,
        slurm,
    ),
    "skypilot": Launcher(
        "managed job of SkyPilot, on GPUs or TPUs of many clouds",
        "run.yaml --on h100x8 --nfs 10.0.0.2:/share --package 'jdpo[cuda]==VERSION'",
        SkyPilotOptions,
        skypilot,
    ),
    "tpu-vm": Launcher(
        "TPU VMs of Google Cloud, by queued resources",
        "run.yaml --on v6e-8 --zone ZONE --nfs 10.0.0.2:/share --package 'jdpo[tpu]==VERSION'",
        TpuVmOptions,
        tpu_vm,
    ),
    "host": Launcher(
        "script for one machine with one or several GPUs", "run.yaml beta=0.2 --on h100x8", HostOptions, host
    ),
}
"""Name of a launcher -> what it is."""


def launcher_of(name: str) -> Launcher:
    """Returns a launcher by its name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in LAUNCHERS:
        hint = _ELSEWHERE.get(name.lower()) or did_you_mean(name, LAUNCHERS)
        raise ValueError(
            f"unknown launcher {name!r}; expected one of {', '.join(LAUNCHERS)}" + (f"; {hint}" if hint else "")
        )
    return LAUNCHERS[name]


_ELSEWHERE = {
    **dict.fromkeys(("gke", "k8s", "kubernetes", "kubectl", "kueue", "xpk"), "Kubernetes is `jobset`"),
    **dict.fromkeys(("sbatch", "srun"), "Slurm is `slurm`"),
    **dict.fromkeys(("sky", "skypilot.yaml"), "SkyPilot is `skypilot`"),
    **dict.fromkeys(("tpu", "tpuvm", "tpu_vm", "gcloud", "queued-resource"), "TPU VMs are `tpu-vm`"),
    **dict.fromkeys(("local", "localhost", "single", "torchrun"), "one machine with several GPUs is `host`"),
}
