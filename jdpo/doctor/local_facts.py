"""The facts that a process finds out about itself, without devices and without the other processes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jdpo._version import __version__
from jdpo.config import TrainConfig, public_text, to_public_dict
from jdpo.data.prepared.prepare import cache_folder
from jdpo.doctor.device_trial import flag_error
from jdpo.doctor.folder_trial import DISK_SECONDS
from jdpo.doctor.input_files import checkpoint_bytes, data_files, model_files
from jdpo.doctor.process_facts import ProcessFacts
from jdpo.doctor.time_limit import TimeLimits
from jdpo.file_digests import code_digests
from jdpo.processes import Membership
from jdpo.training.fit.host_memory import host_memory

READING_SECONDS = 120.0
"""Time limit for reading all data to compare it; what takes longer is not compared."""

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    *(f"{name}-cu{version}" for version in (12, 13) for name in ("nvidia-nccl", "nvidia-cudnn")),
    *(f"jax-cuda{version}-{part}" for version in (12, 13) for part in ("plugin", "pjrt")),
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
)
"""Packages whose versions processes compare."""

_COMPARED = re.compile(r"(XLA|LIBTPU|JAX|NCCL|MEGASCALE)_\w+|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE")
_NOT_COMPARED = re.compile(
    r"JAX_(PROCESS_ID|LOCAL_DEVICE_IDS|COORDINATOR_BIND_ADDRESS|COORDINATOR_ADDRESS)|MEGASCALE_SLICE_ID"
    r"|XLA_PYTHON_CLIENT_PREALLOCATE"
)
"""Variables that may differ between processes, or that `jdpo doctor` sets itself."""


class Given(NamedTuple):
    """The config that the command line names.

    Attributes:
      config: the settings.
      missing: required keys that were not given; their values are placeholders.
    """

    config: TrainConfig
    missing: frozenset[str] = frozenset()

    @property
    def of_a_run(self) -> TrainConfig | None:
        """The config if it names a model and data, so that they can be checked; otherwise None."""
        return None if self.missing & {"model_name_or_path", "datasets"} else self.config


def local_facts(
    process: int, membership: Membership | None, given: Given | ValueError | None, limits: TimeLimits
) -> ProcessFacts:
    """Returns the facts of this process, with neither folders nor clock nor devices.

    Args:
      process: index of this process.
      membership: its place in the cluster, if there is one.
      given: the config, why it cannot be read, or None if there is none.
      limits: remembers what does not return.
    """
    package = Path(__file__).parents[1]
    config = given.of_a_run if isinstance(given, Given) else None
    files, errors, slow = _files(config, limits) if config is not None else ({}, (), ())
    try:
        code = limits.run("the package jdpo", READING_SECONDS, lambda: code_digests(package))
    except OSError as error:  # a TimeoutError is one, too
        code = {"(not readable)": f"{package}: {error}"}
    memory_size = host_memory().size
    return ProcessFacts(
        process=process,
        host=socket.gethostname(),
        pid=os.getpid(),
        found_by="" if membership is None else membership.source,
        versions=versions(),
        # A digest of 64 bits tells files apart that nobody made alike on purpose.
        code={name: digest[:16] for name, digest in code.items()},
        code_place=str(package),
        config=_texts(given) if isinstance(given, Given) else None,
        config_error=str(given) if isinstance(given, ValueError) else None,
        files=files,
        file_errors=errors,
        slow_files=slow,
        environment=compared_environment(os.environ),
        flag_error=flag_error(os.environ),
        memory_size=memory_size,
        memory_free=min(_available(Path("/proc/meminfo"), memory_size), memory_size),
        checkpoint_bytes=None if config is None else _or_none(lambda: checkpoint_bytes(config), limits),
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python, of jdpo, of PACKAGES where they are installed, and of the NVIDIA driver."""
    found = {"python": platform.python_version(), "jdpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = Path("/sys/module/nvidia/version")
    if driver.is_file():
        found["NVIDIA driver"] = driver.read_text(encoding="ascii", errors="replace").strip()
    return found


def compared_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that change what is computed or how processes communicate, except those of one process."""
    return {
        name: public_text(value)
        for name, value in sorted(environ.items())
        if _COMPARED.fullmatch(name) and not _NOT_COMPARED.fullmatch(name)
    }


def _texts(given: Given) -> dict[str, str]:
    """Returns the settings as {key: text}; keys of groups as group.key."""
    flat: dict[str, str] = {}
    for key, value in to_public_dict(given.config).items():
        if key in given.missing:
            continue
        inner: Mapping[str, Any] = value if isinstance(value, dict) else {"": value}
        flat.update({f"{key}.{name}".rstrip("."): str(one) for name, one in inner.items()})
    return flat


def _files(config: TrainConfig, limits: TimeLimits) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Returns the digests of data and model, what cannot be read, and what takes too long."""
    files: dict[str, str] = {}
    errors, slow = [], []
    try:
        files |= limits.run("the model", READING_SECONDS, lambda: model_files(config))
    except TimeoutError as error:
        errors.append(f"model {public_text(config.model_name_or_path)}: {error}")
    except (OSError, ValueError) as error:
        errors.append(str(error))
    end = time.monotonic() + READING_SECONDS
    for name, digests in data_files(config):
        try:
            # First whether the disk answers at all, which does not depend on the size of the data.
            limits.run(name, DISK_SECONDS, partial(os.path.exists, os.path.expanduser(name)))
        except TimeoutError as error:
            errors.append(f"{name}: {error}")
            continue
        try:
            files |= limits.run(name, max(1.0, end - time.monotonic()), digests)
        except TimeoutError:
            slow.append(f"{name}: reading all data takes longer than {READING_SECONDS:.0f} s")
        except (OSError, ValueError) as error:
            errors.append(str(error))
    return files, tuple(map(public_text, errors)), tuple(slow)


def _or_none(find: Callable[[], int | None], limits: TimeLimits) -> int | None:
    try:
        return limits.run("the model", DISK_SECONDS, find)
    except (OSError, ValueError):  # reported by `_files`
        return None


def _available(meminfo: Path, default: int) -> int:
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return default
    return int(found[1]) * 1024 if found else default


# --- folders


def folders_of(given: Given | ValueError | None) -> dict[str, Path]:
    """Returns the folders that a run writes to, by their keys."""
    if not isinstance(given, Given):
        return {"cache_dir": cache_folder(None)}
    folders = {} if "output_dir" in given.missing else {"output_dir": Path(given.config.output_dir)}
    return folders | {"cache_dir": cache_folder(given.config.cache_dir)}
