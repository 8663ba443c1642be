"""Describes the machine and the code of a benchmark for its report."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jdpo import __version__

ROOT = Path(__file__).resolve().parents[1]


def machine_line(packages: Sequence[str] = ("jax", "flax", "optax")) -> str:
    """Returns processor, GPUs, versions and the measured commit."""
    listed = ", ".join(f"{name} {version(name)}" for name in packages)
    parts = [f"{processor()}, {os.cpu_count()} cores", *gpus(), f"Python {platform.python_version()}"]
    return f"{', '.join(parts)}, jdpo {__version__} ({commit()}), {listed}"


def processor() -> str:
    """Returns the processor's name as Linux reports it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def gpus() -> list[str]:
    """Returns the names of the NVIDIA GPUs and their driver, or nothing without nvidia-smi."""
    listed = _output("nvidia-smi", "-L")
    if not listed:
        return []
    names = [line.partition(" (UUID")[0] for line in listed.splitlines()]
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return [*names, f"driver {(driver or 'unknown').splitlines()[0]}"]


def commit() -> str:
    """Returns the commit of the checkout, and whether the package differs from it."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if not found:
        return "commit unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "jdpo")
    return f"commit {found}{', with changes' if changed else ''}"


def _output(*command: str) -> str:
    """Returns the output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
