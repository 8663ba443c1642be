"""Starts processes on loopback that stand for the hosts of one run, and always ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jdpo


class End(NamedTuple):
    """How a process ended: its exit code and what it wrote to stderr."""

    code: int
    log: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(index: int, *, count: int, port: int) -> dict[str, str]:
    """What a process is told of the others; eight devices are shared out among them.

    Collectives of CPUs give up after 30 s by default, which a slow machine spends compiling.
    """
    flags = {
        "xla_force_host_platform_device_count": 8 // count,
        "xla_cpu_collective_timeout_seconds": 600,
        "xla_cpu_collective_call_terminate_timeout_seconds": 600,
    }
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONPATH": str(Path(jdpo.__file__).parents[1]),
    }


def run_cluster(
    commands: Sequence[Sequence[object]], folders: Sequence[Path] | None = None, *, timeout: float = 240
) -> list[End]:
    """Runs `python COMMAND` for each of some commands as one cluster and waits for all; none outlives this call.

    Args:
      folders: where each runs; None: all here.

    Raises:
      AssertionError: one still runs after `timeout` seconds; it has the logs.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as logs:
        files = [Path(logs) / str(index) for index in range(len(commands))]  # pipes would fill while another is read
        processes = []
        try:
            for index, (command, file) in enumerate(zip(commands, files, strict=True)):
                with file.open("w") as stderr:
                    process = subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        cwd=folders[index] if folders else None,
                        env=environment(index, count=len(commands), port=port),
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                processes.append(process)
            deadline = time.monotonic() + timeout
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.1)
            running = [index for index, process in enumerate(processes) if process.poll() is None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [file.read_text() for file in files]
        assert not running, f"processes {running} still ran after {timeout} s: {said}"
        return [End(process.returncode, log) for process, log in zip(processes, said, strict=True)]
