"""Starts processes on loopback that represent the hosts of one run, and always ends them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jdpo

XLA_FLAGS = {
    # By default JAX gives up after 30 s and 40 s, which a slow machine spends compiling.
    "xla_cpu_collective_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "xla_backend_optimization_level": 0,  # compiling takes longer than all steps
}


class End(NamedTuple):
    """The end of a process: its exit code, its stderr and its stdout."""

    code: int
    log: str
    printed: str = ""


class Cluster:
    """The running processes of one cluster."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
        self.processes, self._logs = processes, logs

    def wait(self, timeout: float) -> list[End]:
        """
        Raises:
          AssertionError: a process still runs after `timeout` seconds; the message holds all logs.
        """
        deadline = time.monotonic() + timeout
        while running := [index for index, process in enumerate(self.processes) if process.poll() is None]:
            assert time.monotonic() < deadline, f"processes {running} still run after {timeout} s: {self.logs()}"
            time.sleep(0.1)
        ends = zip(self.processes, self._logs, strict=True)
        return [End(process.returncode, log.read_text(), _output(log).read_text()) for process, log in ends]

    def logs(self) -> list[str]:
        """Returns what each has printed so far."""
        return [log.read_text() for log in self._logs]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[object]],
    folders: Sequence[Path] | None = None,
    *,
    environs: Mapping[int, Mapping[str, str]] | None = None,
    missing: Sequence[int] = (),
    num_devices: int = 8,
) -> Iterator[Cluster]:
    """Runs `python COMMAND` for each of some commands as one cluster; none outlives the context.

    Args:
      folders: working folder of each process; None: this one for all.
      environs: further environment variables of some processes.
      missing: processes that are not started.
      num_devices: of all processes together.
    """
    count, port = len(commands), free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Files: nobody reads while the processes run, and a full pipe would block them.
        logs = [Path(folder) / str(index) for index in range(count) if index not in missing]
        processes: list[subprocess.Popen[bytes]] = []
        for log in logs:
            index = int(log.name)
            with log.open("wb") as stderr, _output(log).open("wb") as stdout:
                process = subprocess.Popen(
                    [sys.executable, *map(str, commands[index])],
                    cwd=folders[index] if folders else None,
                    env=_environment(index, count, num_devices // count, port) | dict((environs or {}).get(index, {})),
                    stdout=stdout,
                    stderr=stderr,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield Cluster(processes, logs)


def run_cluster(
    commands: Sequence[Sequence[object]],
    folders: Sequence[Path] | None = None,
    *,
    timeout: float = 400,
    environs: Mapping[int, Mapping[str, str]] | None = None,
    missing: Sequence[int] = (),
    num_devices: int = 8,
) -> list[End]:
    """Starts the commands as one cluster and waits for all of them; see `started`."""
    with started(commands, folders, environs=environs, missing=missing, num_devices=num_devices) as cluster:
        return cluster.wait(timeout)


def _output(log: Path) -> Path:
    """Returns the file of a process's stdout."""
    return log.with_suffix(".out")


def _environment(index: int, count: int, num_local: int, port: int) -> dict[str, str]:
    flags = {"xla_force_host_platform_device_count": num_local, **XLA_FLAGS}
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONPATH": str(Path(jdpo.__file__).parents[1]),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
