"""Runs as a managed job of SkyPilot, on GPUs of any cloud or on TPUs."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from jdpo.launch.launch_options import option
from jdpo.launch.launched import Advice, Launch, export_secrets, put_paths
from jdpo.launch.rendering import render
from jdpo.launch.rented_hosts import RentedHostOptions, check_package, check_storage, copied_files, script_values
from jdpo.launch.request import LaunchRequest
from jdpo.launch.run_environment import COORDINATOR_PORT, environment_of
from jdpo.launch.shell_words import check_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyPilotOptions(RentedHostOptions):
    """The options of `jdpo launch skypilot`."""

    infra: str = option("INFRA", "Cloud, region or zone, such as gcp/us-east5; by default SkyPilot takes the cheapest.")
    spot: bool = option("", "Use spot machines: cheaper, and taken away at any time.", default=False)
    disk_size: int = option("GB", "Size of the disk of each node; by default SkyPilot's.", default=0)


def skypilot(request: LaunchRequest, options: SkyPilotOptions) -> Launch:
    """Returns the task of a managed job, and the command that starts it.

    Raises:
      ValueError: SkyPilot does not offer the machine, or the nodes could not find the config's files.
    """
    _check(request, options)
    path = request.folder / "skypilot.yaml"
    nodes = request.machine.num_hosts if request.machine.is_gpu else 1
    values = script_values(request, options)
    text = render(
        "skypilot.yaml.jinja",
        request,
        options,
        nodes=nodes,
        path=path,
        accelerators=_accelerators(request),
        files=_files(request, options),
        variables=environment_of(request, cache=f"{options.mount}/cache"),
        setup=render("skypilot-setup.sh.jinja", request, options, **values),
        run=render("skypilot-run.sh.jinja", request, options, nodes=nodes, port=COORDINATOR_PORT, **values),
    )
    # The values of secrets go from the environment to SkyPilot, and are not in the command line.
    secrets = [name for name in request.secrets if name in request.required_secrets or os.environ.get(name)]
    words = ["sky", "jobs", "launch", "--yes", "--detach-run", *(w for name in secrets for w in ("--secret", name))]
    return Launch(
        files={path: text},
        commands=((*words, str(path)),),
        installs={
            "sky": "install it (`uv tool install 'skypilot[gcp]'`, or [aws] and others), and see `sky check` for "
            "access to clouds"
        },
        before=_before(request, options),
        after=_after(request),
    )


def _check(request: LaunchRequest, options: SkyPilotOptions) -> None:
    machine = request.machine
    if not machine.is_gpu and machine.gcloud_type is None:
        raise ValueError(f"{machine.name} is offered only on GKE: use `jdpo launch jobset`")
    if not machine.is_gpu and machine.slices > 1:
        raise ValueError(
            f"{machine.name}: SkyPilot does not join several TPU slices; use `jdpo launch jobset` or `tpu-vm`, or a "
            "single larger slice"
        )
    check_lines(options, "infra")
    check_storage(request, options, "skypilot")
    check_package(request, options)


def _accelerators(request: LaunchRequest) -> str:
    machine = request.machine
    return f"{machine.version.upper()}:{machine.devices_per_host}" if machine.is_gpu else f"tpu-{machine.gcloud_type}:1"


def _files(request: LaunchRequest, options: SkyPilotOptions) -> Mapping[str, str]:
    """Returns the files that SkyPilot copies: path on the nodes -> path here."""
    copied = [str(request.config_path), *copied_files(options)]
    files = {f"~/jdpo/{Path(path).name}": path for path in copied}
    if not options.nfs:
        # An absolute path stays what it is.
        files |= {str(PurePosixPath(options.mount) / path): path for path in request.local_paths()}
    return files


def _before(request: LaunchRequest, options: SkyPilotOptions) -> tuple[Advice, ...]:
    return (
        export_secrets(
            request,
            "Set tokens and keys in the shell that launches, unless the run needs none; those that are set are passed "
            "on (`--secret NAME`):",
        ),
        *(put_paths(request, options.mount, on="share", by="nodes") if options.nfs else ()),
    )


def _after(request: LaunchRequest) -> tuple[Advice, ...]:
    name = shlex.quote(request.name)
    return (
        Advice("See the job, its recoveries, and whether it has ended:", "sky jobs queue"),
        Advice("Follow the log of all nodes:", f"sky jobs logs --name {name}"),
        Advice(
            "End it at once, and its machines. The same `jdpo launch` continues from the last checkpoint:",
            f"sky jobs cancel --name {name}",
        ),
    )
