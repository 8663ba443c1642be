"""Runs on TPU VMs of Google Cloud, which are created as a queued resource."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path, PurePosixPath

from jdpo.launch.launch_options import option
from jdpo.launch.launched import Advice, Launch, export_secrets, put_paths
from jdpo.launch.rendering import render
from jdpo.launch.rented_hosts import RentedHostOptions, check_package, check_storage, copied_files, script_values
from jdpo.launch.request import LaunchRequest
from jdpo.launch.run_environment import environment_of
from jdpo.launch.shell_words import check_lines, check_passed_on

POLL_SECONDS = 30

RETRY_SECONDS = 600
"""Between tries to create a slice again, when Google Cloud has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmOptions(RentedHostOptions):
    """The options of `jdpo launch tpu-vm`."""

    zone: str = option("ZONE", "Zone of the slice.", required="where the slice is created, such as us-east5-b")
    project: str = option("PROJECT", "Project that pays; by default that of gcloud.")
    spot: bool = option("", "Use spot capacity: cheaper, and taken away at any time.", default=False)
    reserved: bool = option("", "Use the project's reservation.", default=False)
    keep: bool = option("", "Keep the slice at the end; it costs until it is deleted.", default=False)
    create: tuple[str, ...] = option(
        "OPTION",
        "Further option of `gcloud compute tpus queued-resources create`, such as --network=NAME or "
        "--service-account=ACCOUNT; may be repeated.",
        default=(),
    )


def tpu_vm(request: LaunchRequest, options: TpuVmOptions) -> Launch:
    """Returns a script that creates the slice and watches the run, and one that the hosts run.

    Raises:
      ValueError: the machine is not offered as TPU VMs, or the hosts could not find the config's files.
    """
    _check(request, options)
    script, worker = request.folder / "tpu-vm.sh", request.folder / "worker.sh"
    copied_paths = [] if options.nfs else request.local_paths()
    of_worker = render(
        "worker.sh.jinja",
        request,
        options,
        variables=environment_of(request, cache=f"{options.mount}/cache"),
        of_disk=copied_paths,
        **script_values(request, options),
    )
    text = render(
        "tpu-vm.sh.jinja",
        request,
        options,
        script=script,
        nodes=_slices(request),
        create=_create(request, options),
        inputs=[str(worker), str(request.config_path), *copied_files(options), *copied_paths],
        logs=request.folder / "logs",
        poll_seconds=POLL_SECONDS,
        retry_seconds=RETRY_SECONDS,
    )
    return Launch(
        files={script: text, worker: of_worker},
        commands=(("bash", str(script)),),
        installs={
            "bash": "install it",
            "gcloud": "install it (https://cloud.google.com/sdk/docs/install), then `gcloud auth login`",
        },
        before=_before(request, options, script),
        after=(),
        failed=(
            Advice("See whether the slice is there, and its state:", _describe(request, options)),
            Advice("Delete it, if nothing on its disks is needed; until then it costs:", f"{_bash(script)} delete"),
        ),
    )


def _check(request: LaunchRequest, options: TpuVmOptions) -> None:
    machine = request.machine
    if machine.is_gpu:
        raise ValueError(f"{machine.name}: `jdpo launch tpu-vm` is for TPUs; use `jdpo launch slurm` or `skypilot`")
    if machine.gcloud_type is None:
        raise ValueError(f"{machine.name} is not offered as TPU VMs, only on GKE: use `jdpo launch jobset`")
    if options.spot and options.reserved:
        raise ValueError("--spot and --reserved exclude each other")
    check_lines(options, "zone", "project")
    check_passed_on(options, "create")
    check_storage(request, options, "tpu-vm")
    check_package(request, options)
    if not options.nfs:
        for path in request.local_paths():
            if PurePosixPath(path).name != path:
                raise ValueError(
                    f"{path}: without --nfs, only files and folders in the current folder are copied to the host; run "
                    f"`jdpo launch` in the folder of {path} and name it {PurePosixPath(path).name}, or use an address"
                )


def _slices(request: LaunchRequest) -> list[str]:
    """Returns the names of the TPU VMs: gcloud numbers those of several slices."""
    slices = request.machine.slices
    return [request.name] if slices == 1 else [f"{request.name}-{index}" for index in range(slices)]


def _create(request: LaunchRequest, options: TpuVmOptions) -> list[str]:
    slices = request.machine.slices
    nodes = [f"--node-id={request.name}"]
    if slices > 1:
        nodes = [f"--node-count={slices}", f"--node-prefix={request.name}"]
    tier = ["--spot"] if options.spot else ["--reserved"] if options.reserved else []
    return [*nodes, *tier, *options.create]


def _describe(request: LaunchRequest, options: TpuVmOptions) -> str:
    words = ["gcloud", "compute", "tpus", "queued-resources", "describe", request.name, f"--zone={options.zone}"]
    return shlex.join([*words, *([f"--project={options.project}"] if options.project else [])])


def _bash(script: Path) -> str:
    return shlex.join(["bash", str(script)])


def _before(request: LaunchRequest, options: TpuVmOptions, script: Path) -> tuple[Advice, ...]:
    logs = script.parent / "logs" / "START" / _slices(request)[0] / "0.log"
    return (
        export_secrets(request, "Set tokens and keys in the shell that starts it, unless the run needs none:"),
        *(put_paths(request, options.mount, on="share", by="hosts") if options.nfs else ()),
        Advice(
            "The script watches the run, and creates the slice again after a preemption: start it on a machine that "
            "stays on. If it ends, the run goes on; the same command attaches to it. To log out in the meantime:",
            f"nohup {_bash(script)} &",
        ),
        Advice(
            "Follow the first process; START is a time that the script prints:", f"tail -F {shlex.quote(str(logs))}"
        ),
        Advice("Save and end the run:", f"{_bash(script)} stop"),
        Advice("Delete the slice at once:", f"{_bash(script)} delete"),
    )
