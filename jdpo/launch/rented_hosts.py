"""Hosts that a cloud rents out without jdpo: how it gets there, and storage that outlives them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.launch.launch_options import option
from jdpo.launch.request import LaunchRequest, data_paths
from jdpo.launch.shell_words import one_line

UV_VERSION = "0.13.9"
"""The version of the installer, which brings a Python of its own: that of the hosts may be older than jdpo allows."""

PYTHON_VERSION = "3.12"

CONFIG = "$config"
"""The config in a command line: a variable of the shell on the hosts."""

_OF_SCHEMES = {"gs://": "gcs", "s3://": "s3"}
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers whose extra has their name."""

MOUNTED = "/mnt/jdpo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RentedHostOptions:
    """The options of every launcher that installs jdpo on hosts."""

    package: str = option(
        "PACKAGE",
        "What the hosts install: a wheel of jdpo here, which is copied to them (`pip wheel --no-deps .` makes one), or "
        "a fixed version as pip takes it.",
        required="what the hosts install: the path of a wheel, which `pip wheel --no-deps .` makes in the project's "
        "root, or 'jdpo[tpu] @ git+https://github.com/OWNER/jdpo@COMMIT', with [cuda] for GPUs",
    )
    constraints: str = option(
        "FILE",
        "File here that fixes the versions of all packages, such as docker/requirements-tpu.txt, so that hosts which "
        "are created later get the same ones.",
    )
    nfs: str = option(
        "ADDRESS:/SHARE",
        "ADDRESS:/SHARE of an NFS server (Filestore, EFS) in the network of the hosts, for output_dir and caches; "
        "required for more than one host.",
    )
    mount: str = option(
        "FOLDER",
        "Folder of the hosts at which the share is mounted, and in which the run starts.",
        default=MOUNTED,
    )


def check_storage(request: LaunchRequest, options: RentedHostOptions, launcher: str) -> None:
    """Checks that checkpoints survive the hosts, and that all hosts see the same output_dir.

    Raises:
      ValueError: they do not, or an option is malformed.
    """
    nfs, mount = options.nfs, options.mount
    if not Path(one_line(mount, "--mount")).is_absolute() or mount == "/":
        raise ValueError(f"--mount {mount}: expected an absolute path, such as {MOUNTED}")
    if nfs:
        if not re.fullmatch(r"[\w.\-]+:/[\w./\-]*", nfs):
            raise ValueError(f"--nfs {nfs}: expected ADDRESS:/SHARE, such as 10.0.0.2:/share")
        return
    hosts = request.machine.num_hosts
    if hosts > 1:
        raise ValueError(
            f"`jdpo launch {launcher}` needs --nfs ADDRESS:/SHARE: the {hosts} hosts of {request.machine.name} share "
            "no disk, and output_dir has to be one folder for all of them. A mounted bucket (gcsfuse) is not enough: a "
            "run locks, renames and appends to its files"
        )
    if not request.config.mirror:
        raise ValueError(
            f"`jdpo launch {launcher}` needs --nfs ADDRESS:/SHARE, or a config with a mirror (gs://... or s3://...): "
            "the host's own disk is gone with the host, and with it every checkpoint"
        )
    if Path(request.config.output_dir).is_absolute():
        raise ValueError(
            f"output_dir {request.config.output_dir}: expected a relative path, which is in {mount} on the host"
        )


def check_package(request: LaunchRequest, options: RentedHostOptions) -> None:
    """Checks that hosts get JAX for their devices, and those that are created later the same packages.

    Raises:
      ValueError: the package is neither a wheel that exists nor a fixed version, or is for other devices, or there are
        no such constraints.
    """
    package, constraints = one_line(options.package, "--package"), options.constraints
    extra = _extra_of(request)
    if _is_wheel(package):
        if not Path(package).is_file():
            raise ValueError(f"--package {package}: there is no such wheel; `pip wheel --no-deps .` makes one")
    elif "==" not in package and "@" not in package:
        raise ValueError(
            f"--package {package}: hosts that are created later would install another version; expected a wheel, "
            f"'jdpo[{extra}]==VERSION' or 'jdpo[{extra}] @ git+https://...@COMMIT'"
        )
    elif not re.match(rf"[^\[]*\[([^\]]*,)?\s*{extra}\s*[,\]]", package):
        raise ValueError(
            f"--package {package}: without the extra {extra}, JAX does not find the devices of {request.machine.name}; "
            f"expected jdpo[{extra}], or with further extras jdpo[{extra},gcs]"
        )
    if constraints and not Path(constraints).is_file():
        raise ValueError(f"--constraints {constraints}: there is no such file")


def copied_files(options: RentedHostOptions) -> list[str]:
    """Returns the files here from which the hosts install jdpo: a wheel and constraints, if they are given."""
    package, constraints = options.package, options.constraints
    return [*([package] if _is_wheel(package) else []), *([constraints] if constraints else [])]


def script_values(request: LaunchRequest, options: RentedHostOptions) -> dict[str, Any]:
    """Returns the values of the templates of scripts that install jdpo on hosts and run the command there."""
    doctor = request.doctor_words(CONFIG)
    return {
        "config_name": request.config_path.name,
        "package": _requirement(request, options.package),
        "installed_from": [Path(path).name for path in copied_files(options)],
        "constraints_name": Path(options.constraints).name,
        "uv_version": UV_VERSION,
        "python_version": PYTHON_VERSION,
        "command": command_line(request.words(CONFIG)),
        "doctor": doctor and command_line(doctor),
    }


def _extra_of(request: LaunchRequest) -> str:
    return "cuda" if request.machine.is_gpu else "tpu"


def _is_wheel(package: str) -> bool:
    return package.endswith(".whl") and "://" not in package


def _requirement(request: LaunchRequest, package: str) -> str:
    """Returns what pip installs: a wheel, which is in the current folder there, with the extras that the run needs."""
    if not _is_wheel(package):
        return package
    config = request.config
    named = [config.mirror or "", *data_paths(config)]
    extras = [
        _extra_of(request),
        *(extra for scheme, extra in _OF_SCHEMES.items() if any(each.startswith(scheme) for each in named)),
        *(each for each in config.report_to if each in _TRACKERS),
    ]
    return f"./{Path(package).name}[{','.join(extras)}]"


def command_line(words: Sequence[str]) -> str:
    """Returns a command line in which `CONFIG` is a variable of the shell.

    >>> print(command_line(["jdpo", "dpo", CONFIG, "name=a b"]))
    jdpo dpo "$config" 'name=a b'
    """
    return " ".join(f'"{word}"' if word == CONFIG else shlex.quote(word) for word in words)
