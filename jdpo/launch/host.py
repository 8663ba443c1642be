"""Runs on one machine: a script that starts the run again after a failure from which it can continue."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from jdpo.launch.launch_options import option
from jdpo.launch.launched import Advice, Launch, export_secrets
from jdpo.launch.rendering import render
from jdpo.launch.request import LaunchRequest
from jdpo.launch.run_environment import environment_of
from jdpo.launch.shell_words import CACHE, CHDIR, SETUP, cache_folder, check_lines, path_in, working_folder
from jdpo.planning.machines import Machine

MOST_BACKOFF_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """The options of `jdpo launch host`."""

    processes: int = option(
        "N",
        "Processes that share the GPUs equally, and meet over loopback. A single process uses all of them.",
        default=1,
    )
    backoff_seconds: int = option(
        "SECONDS",
        f"Time before the first restart; it doubles with each one, up to {MOST_BACKOFF_SECONDS} s.",
        default=10,
    )
    cache: str = option("DIR", CACHE)
    chdir: str = option("DIR", CHDIR)
    setup: tuple[str, ...] = option("COMMAND", SETUP, default=())


def host(request: LaunchRequest, options: HostOptions) -> Launch:
    """Returns a script that runs the command on this machine, and the command that starts it.

    Raises:
      ValueError: the machine is more than one host, or its devices cannot be divided.
    """
    machine = request.machine
    _check(machine, options)
    script = request.folder / "host.sh"
    folder = working_folder(options.chdir)
    log = request.folder / request.name
    config = path_in(folder, request.config_path)
    text = render(
        "host.sh.jinja",
        request,
        options,
        script=script,
        folder=folder,
        variables=environment_of(request, cache=cache_folder(options.cache, os.environ)),
        command=request.words(config),
        doctor=request.doctor_words(config),
        log=log,
        share=machine.devices_per_host // options.processes,
        most_backoff=MOST_BACKOFF_SECONDS,
    )
    return Launch(
        files={script: text},
        commands=(("bash", str(script)),),
        installs={"bash": "install it"},
        before=_before(request, script),
        after=(Advice("Follow the first process:", f"tail -F {shlex.quote(f'{log}-0.log')}"),),
    )


def _check(machine: Machine, options: HostOptions) -> None:
    if machine.num_hosts > 1:
        raise ValueError(
            f"{machine.name} is {machine.num_hosts} hosts, and `jdpo launch host` is for one; use `jdpo launch slurm`, "
            "`jobset`, `skypilot` or `tpu-vm`"
        )
    devices = machine.devices_per_host
    if devices % options.processes:
        raise ValueError(f"--processes {options.processes}: {devices} devices cannot be shared equally")
    if options.processes > 1 and not machine.is_gpu:
        raise ValueError(f"--processes {options.processes}: on TPUs one process uses all chips of a host")
    check_lines(options, "setup")


def _before(request: LaunchRequest, script: Path) -> tuple[Advice, ...]:
    log = f"{request.folder / request.name}-0.log"
    return (
        export_secrets(request, "Set tokens and keys in the shell that starts it, unless the run needs none:"),
        Advice(
            "The script keeps your shell until the run has ended, and the run prints to files, see "
            f"{shlex.quote(log)}. To log out in the meantime:",
            f"nohup bash {shlex.quote(str(script))} &",
        ),
        Advice("Ctrl-C, or SIGTERM to the script, saves and ends the run. The same command continues it."),
    )
