"""The trial of a folder: every process writes a file, and reads what the others have written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from jdpo.doctor.fact_exchange import FactExchange
from jdpo.doctor.process_facts import FolderFacts
from jdpo.doctor.time_limit import TimeLimits
from jdpo.durable import write_durably

DISK_SECONDS = 20.0
"""Time limit for a disk to answer."""

_SIZE = 2**18
_PATIENCE = 2.0
"""Seconds until a file counts as absent: network file systems show new files a little later."""
_UNESCAPED = re.compile(r"\\([0-7]{3})")


class Trial(Protocol):
    """A trial of a folder or an object store by one process. Its calls may take forever, if there is no answer.

    Attributes:
      address: the path or the address, for messages.
    """

    address: str

    def write(self) -> float:
        """Writes a file and reads it back; returns the seconds that this took."""

    def read_others(self, processes: Iterable[int]) -> tuple[int, ...]:
        """Returns those of `processes` whose files this one can read."""

    def place(self) -> tuple[str, str, int | None]:
        """Returns where the file system is mounted, its type, and its free bytes."""

    def remove_file(self) -> None:
        """Removes the file of this process."""

    def remove_folders(self) -> None:
        """Removes what was created for the file, once all processes have removed theirs."""


class FolderTrial:
    """A trial of one folder by one process."""

    def __init__(self, path: Path, *, token: str, process: int) -> None:
        """
        Args:
          path: the folder; it is created if it is missing, as a run would.
          token: part of the names of the files, the same on all processes and in no other trial.
          process: index of this process.
        """
        self.address = os.path.abspath(path)
        self.path, self._token, self._process = path, token, process
        self._missing: list[Path] = []  # before the trial, outermost last

    def write(self) -> float:
        """Writes the file of this process durably, as a run writes its files, and reads it back.

        Returns:
          seconds that this took.

        Raises:
          OSError: the folder cannot be created, written or read, or the content that is read is another one.
        """
        begin = time.monotonic()
        self._missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self._file(self._process)
        write_durably(file, self._content(self._process))
        if file.read_bytes() != self._content(self._process):
            raise OSError(f"{file}: the content that was read is not what was written")
        return time.monotonic() - begin

    def read_others(self, processes: Iterable[int]) -> tuple[int, ...]:
        """Returns those of `processes` whose files are here and hold what they wrote.

        Raises:
          OSError: such a file is here and cannot be read, or has another content.
        """
        end = time.monotonic() + _PATIENCE
        left, seen = set(processes), set[int]()
        while left:
            for process in sorted(left):
                try:
                    content = self._file(process).read_bytes()
                except FileNotFoundError:
                    continue
                if content != self._content(process):
                    raise OSError(f"{self._file(process)}: not what process {process} wrote")
                seen.add(process)
            left -= seen
            if time.monotonic() > end:
                break
            time.sleep(0.05 if left else 0)
        return tuple(sorted(seen))

    def place(self) -> tuple[str, str, int | None]:
        """Returns where the file system is mounted, its type, and its free bytes."""
        return (*mount_of(self.path), free_bytes(self.path))

    def remove_file(self) -> None:
        """Removes the file of this process."""
        with contextlib.suppress(OSError):  # it may never have been written
            self._file(self._process).unlink(missing_ok=True)

    def remove_folders(self) -> None:
        """Removes the folders that were missing before, if all processes have removed their files."""
        for folder in self._missing:
            with contextlib.suppress(OSError):  # another process has removed it, or something is in it
                folder.rmdir()

    def _file(self, process: int) -> Path:
        return self.path / f".jdpo-doctor-{self._token}-{process}"

    def _content(self, process: int) -> bytes:
        line = f"process {process} of {self._token}\n".encode()
        return (line * (_SIZE // len(line) + 1))[:_SIZE]


def mount_of(path: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, str]:
    """Returns where the file system of a path is mounted, and its type; ("", "") if that is unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""
    real = Path(os.path.realpath(path))
    found = ("", "")
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # The kernel writes spaces in paths as \040.
        mounted = _UNESCAPED.sub(lambda code: chr(int(code[1], 8)), fields[1])
        # The later of two mounts at one place hides the earlier one.
        if real.is_relative_to(mounted) and len(mounted) >= len(found[0]):
            found = mounted, fields[2]
    return found


def free_bytes(path: Path) -> int:
    """Returns the free space of the file system that holds a path, or will hold it once it is created."""
    here = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(here).free


def try_folders(trials: Mapping[str, Trial], exchange: FactExchange, limits: TimeLimits) -> tuple[FolderFacts, ...]:
    """Lets all processes write, read what the others wrote, and clean up; returns what this one found.

    Args:
      trials: the config's key of a folder -> its trial. The keys may differ between processes.
    """
    folders = {key: _write(key, trial, limits) for key, trial in trials.items()}
    exchange.wait("written")
    for key, trial in trials.items():
        folders[key] = _read(folders[key], trial, range(exchange.count), limits)
    exchange.wait("read")
    # A disk that did not answer is not asked again.
    asked = {key: trial for key, trial in trials.items() if folders[key].answers}
    for key, trial in asked.items():
        with contextlib.suppress(OSError):
            limits.run(f"removing a file from {key}", DISK_SECONDS, trial.remove_file)
    exchange.wait("removed")
    for key, trial in asked.items():
        with contextlib.suppress(TimeoutError):
            limits.run(f"removing {key}", DISK_SECONDS, trial.remove_folders)
    return tuple(folders.values())


def _write(key: str, trial: Trial, limits: TimeLimits) -> FolderFacts:
    facts = FolderFacts(key=key, path=trial.address)
    try:
        facts = dataclasses.replace(facts, seconds=limits.run(f"writing to {key}", DISK_SECONDS, trial.write))
    except TimeoutError as error:
        return dataclasses.replace(facts, error=str(error), answers=False)
    except (OSError, ValueError) as error:  # a ValueError for a store whose package is not installed
        facts = dataclasses.replace(facts, error=str(error))
    try:
        mount, system, free = limits.run(key, DISK_SECONDS, trial.place)
    except OSError:  # what is wrong with it was found above
        return facts
    return dataclasses.replace(facts, mount=mount, file_system=system, free_bytes=free)


def _read(facts: FolderFacts, trial: Trial, processes: Iterable[int], limits: TimeLimits) -> FolderFacts:
    if facts.error is not None:  # which is reported, and what else does not work there follows from it
        return facts
    try:
        seen = limits.run(f"reading from {facts.key}", DISK_SECONDS, lambda: trial.read_others(processes))
    except TimeoutError as error:
        return dataclasses.replace(facts, error=str(error), answers=False)
    except OSError as error:
        return dataclasses.replace(facts, read_error=str(error))
    return dataclasses.replace(facts, sees=seen)
