"""The facts that each process of a cluster finds out about itself; `jdpo.doctor.diagnosis` compares them.

Facts travel between processes as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """A folder that a run writes to, or its mirror, as one process sees it.

    Attributes:
      key: the config's key: output_dir, cache_dir or mirror.
      path: the absolute path, or the address.
      mount: where its file system is mounted; "" if that is unknown.
      file_system: its type, such as ext4, nfs4 or tmpfs; "object store" for a mirror.
      error: why it cannot be written or read back; None if it can.
      answers: False if the error is that the disk did not answer in time.
      free_bytes: free space for this user; None if unknown.
      seconds: time to write a small file durably and to read it back.
      sees: the processes whose files this one can read there, itself included.
      read_error: why a file that another process wrote, and that is there, cannot be read; None if all can.
    """

    key: str
    path: str
    mount: str = ""
    file_system: str = ""
    error: str | None = None
    answers: bool = True
    free_bytes: int | None = None
    seconds: float = 0.0
    sees: tuple[int, ...] = ()
    read_error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The devices as one process sees them.

    Attributes:
      error: why JAX finds no devices, or None.
      waited: True if the error is that there was no answer in time; the cause may be another process.
      platform: "cpu", "gpu" or "tpu".
      kinds: the kind of each device of this process.
      num_all: devices of all processes.
      unused: accelerators that this host has and JAX does not use, in words; "" if there are none.
      mesh: the mesh of the config, such as "1 x 8 x 1 x 1"; "" without a config.
      mesh_error: why the config's mesh or batch does not fit these devices, or None.
      sums: results of the psum on this process's devices; empty if it was not made.
      sum_error: why there is no result, or None.
      sum_seconds: time of one psum after the first.
    """

    error: str | None = None
    waited: bool = False
    platform: str = ""
    kinds: tuple[str, ...] = ()
    num_all: int = 0
    unused: str = ""
    mesh: str = ""
    mesh_error: str | None = None
    sums: tuple[float, ...] = ()
    sum_error: str | None = None
    sum_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFacts:
    """Everything that one process reports.

    Attributes:
      process: its index.
      host, pid: where it runs.
      found_by: what describes the cluster, such as Slurm; "" for a process alone.
      versions: name of Python, a package or a driver -> version.
      code: path within the package jdpo -> digest.
      code_place: the folder of the package.
      config: key -> value, as text; None if no config was given.
      config_error: why the config cannot be read, or None.
      files: name of a file of the datasets or the model -> digest, or size for weights.
      file_errors: what is wrong with datasets or model.
      slow_files: what was not compared, because reading it takes too long.
      environment: variables that change what is computed or how processes communicate.
      flag_error: what is wrong with XLA_FLAGS, or None.
      memory_size, memory_free: bytes of the host, or of the container.
      checkpoint_bytes: upper bound of what the run's checkpoints take in output_dir; None if unknown.
      clock_offset: seconds by which the clock is ahead of that of process 0.
      clock_error: uncertainty of `clock_offset` in seconds, half of the shortest round trip.
      folders: the folders that a run writes to.
      devices: its devices; None if it did not look for them.
      stuck: work that did not return, see `TimeLimits`.
    """

    process: int
    host: str
    pid: int
    found_by: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    code_place: str = ""
    config: Mapping[str, str] | None = None
    config_error: str | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    file_errors: tuple[str, ...] = ()
    slow_files: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flag_error: str | None = None
    memory_size: int = 0
    memory_free: int = 0
    checkpoint_bytes: int | None = None
    clock_offset: float = 0.0
    clock_error: float = 0.0
    folders: tuple[FolderFacts, ...] = ()
    devices: DeviceFacts | None = None
    stuck: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Returns the facts as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessFacts:
        """Reads what `to_json` of another process wrote."""
        values = json.loads(text)
        values["folders"] = tuple(_read(FolderFacts, folder) for folder in values.get("folders", []))
        if values.get("devices") is not None:
            values["devices"] = _read(DeviceFacts, values["devices"])
        return _read(cls, values)


def _read(cls: type[Any], values: Mapping[str, Any]) -> Any:
    # Another version of jdpo, which is for the diagnosis to say, may know other facts.
    known = {field.name for field in dataclasses.fields(cls)}
    # JSON has lists only.
    return cls(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}
    )
