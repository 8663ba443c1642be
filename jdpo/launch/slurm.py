"""Runs on a Slurm cluster: a batch script, which requeues its job."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path

from jdpo.launch.launch_options import option
from jdpo.launch.launched import Advice, Launch, export_secrets
from jdpo.launch.rendering import render
from jdpo.launch.request import LaunchRequest
from jdpo.launch.run_environment import environment_of
from jdpo.launch.shell_words import (
    CACHE,
    CHDIR,
    SETUP,
    cache_folder,
    check_lines,
    check_passed_on,
    one_line,
    path_in,
    working_folder,
)
from jdpo.planning.machines import GPUS_OF_NODE, Machine

_MOST_GRACE_SECONDS = 65535
"""The limit of sbatch --signal."""

_TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE"
"""Time limits that sbatch reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """The options of `jdpo launch slurm`."""

    partition: str = option("NAME", "Partition of the job; by default the cluster's.")
    account: str = option("NAME", "Account that pays for the job; by default the user's.")
    time: str = option(
        "LIMIT",
        "Time limit of one start, such as 24:00:00. Before it ends, the run saves and the job is requeued, so that a "
        "run may take longer. By default the partition's.",
    )
    grace_seconds: int = option(
        "SECONDS",
        "How long before the time limit the run is asked to save: more than a step and a save.",
        default=120,
    )
    tasks_per_node: int = option(
        "N",
        "Processes per node, which share its GPUs equally: 1, or up to one per GPU.",
        default=1,
    )
    cache: str = option("DIR", CACHE)
    chdir: str = option("DIR", CHDIR)
    setup: tuple[str, ...] = option("COMMAND", SETUP, default=())
    sbatch: tuple[str, ...] = option(
        "OPTION", "Further option of sbatch, such as --qos=high; may be repeated.", default=()
    )
    srun: tuple[str, ...] = option(
        "OPTION", "Further option of srun, such as --container-image=IMAGE; may be repeated.", default=()
    )


def slurm(request: LaunchRequest, options: SlurmOptions) -> Launch:
    """Returns a batch script, and the command that submits it.

    Raises:
      ValueError: the machine is no node of GPUs, or an option cannot be written into the script.
    """
    _check(request.machine, options)
    folder = working_folder(options.chdir)
    config = path_in(folder, request.config_path)
    logs = folder / request.folder
    script = request.folder / "slurm.sh"
    text = render(
        "slurm.sh.jinja",
        request,
        options,
        log_name=_log_name(logs, request),
        directives=_directives(request, options, folder=folder, logs=logs),
        variables=environment_of(request, cache=cache_folder(options.cache, os.environ)),
        command=request.words(config),
        doctor=request.doctor_words(config),
    )
    return Launch(
        files={script: text},
        commands=(("sbatch", str(script)),),
        installs={"sbatch": "run this on a login node of the cluster"},
        before=_before(request),
        after=_after(logs / request.name),
    )


def _check(machine: Machine, options: SlurmOptions) -> None:
    if not machine.is_gpu:
        raise ValueError(
            f"{machine.name}: Slurm is for nodes of GPUs, such as h100x16; for TPUs use `jdpo launch jobset` or "
            "`tpu-vm`"
        )
    gpus = machine.devices_per_host
    if gpus % options.tasks_per_node:
        raise ValueError(
            f"--tasks_per_node {options.tasks_per_node}: the {gpus} GPUs of a node cannot be shared equally"
        )
    if options.grace_seconds > _MOST_GRACE_SECONDS:
        raise ValueError(
            f"--grace_seconds {options.grace_seconds}: Slurm signals at most {_MOST_GRACE_SECONDS} seconds before the "
            "time limit"
        )
    if options.time and not re.fullmatch(_TIME, options.time):
        raise ValueError(
            f"--time {options.time!r}: expected minutes, hours:minutes:seconds or days-hours, such as 90, 24:00:00 or "
            "7-0, as in sbatch"
        )
    check_lines(options, "partition", "account", "setup")
    check_passed_on(options, "sbatch", "srun")


def _directives(request: LaunchRequest, options: SlurmOptions, *, folder: Path, logs: Path) -> list[tuple[str, str]]:
    """Returns the options of sbatch in the script, each with its reason, or "" where its name says everything."""
    machine, gpus = request.machine, request.machine.devices_per_host
    own = [(f"--{name}={value}", "") for name in ("partition", "account", "time") if (value := getattr(options, name))]
    if gpus == GPUS_OF_NODE:
        share = [
            (
                "--exclusive",
                "whole nodes: all of their cores, which read and tokenize the data, and all of their memory",
            ),
            ("--mem=0", ""),
        ]
    else:
        share = [("--cpus-per-gpu=8", "cores for reading and tokenizing the data; without it Slurm gives one per task")]
    per = "node, which uses all of its GPUs" if options.tasks_per_node == 1 else "share of a node's GPUs"
    return [
        (f"--job-name={request.name}", ""),
        *own,
        (f"--nodes={machine.num_hosts}", ""),
        (f"--ntasks-per-node={options.tasks_per_node}", f"one task (process) per {per}"),
        (f"--gpus-per-node={gpus}", ""),
        *share,
        (
            f"--signal=TERM@{options.grace_seconds}",
            "so many seconds before the time limit, SIGTERM to all tasks, which save and exit with 143. With B: in "
            "front it would reach this script and no task",
        ),
        ("--requeue", "Slurm may start the job again, as after the failure of a node; jdpo resumes by itself"),
        ("--open-mode=append", "the next start continues the log"),
        (f"--output={_log_name(logs, request)}-%j.out", "in a folder that exists: sbatch creates none"),
        (f"--chdir={folder}", "for relative paths of the config"),
        ("--export=ALL", "tokens and keys come from the environment in which sbatch is called"),
        *((each, "given by --sbatch") for each in options.sbatch),
    ]


def _log_name(logs: Path, request: LaunchRequest) -> str:
    """Returns how the names of a job's logs begin, as an option of Slurm, which replaces what follows a %."""
    return one_line(str(logs / request.name).replace("%", "%%"), "the folder of the logs")


def _before(request: LaunchRequest) -> tuple[Advice, ...]:
    return (
        export_secrets(request, "Set tokens and keys in the shell that calls sbatch, unless the run needs none:"),
        Advice(
            "The config, its data, output_dir, caches and the environment with jdpo have to be on storage that all "
            "nodes see."
        ),
    )


def _after(logs: Path) -> tuple[Advice, ...]:
    start = shlex.quote(str(logs))
    return (
        Advice("sbatch has printed the number of the job, JOB below. Why it waits, and where it runs:", "squeue --me"),
        Advice("Follow its first process:", f"tail -F {start}-JOB-0.log"),
        Advice("See starts and restarts:", f"tail -F {start}-JOB.out"),
        Advice("Save, and start again:", "scancel --signal=TERM JOB"),
        Advice(
            "Save, and end for good. (Plain `scancel JOB` also lets it save, but kills it after the cluster's "
            "KillWait, often 30 s.)",
            "scontrol update job=JOB requeue=0 && scancel --signal=TERM JOB",
        ),
    )
