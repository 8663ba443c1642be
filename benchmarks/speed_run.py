"""Runs an arm of the speed benchmark in a process of its own, and watches it from outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import ROOT
from speed_arms import Arm

POLL_SECONDS = 0.05

Line = dict[str, Any]


class ArmRun(NamedTuple):
    """The outcome of a process.

    Attributes:
      lines: of metrics.jsonl, one per step, up to the last that was wanted.
      measured: the last of them: those that count.
      about: of about.json; empty where there is none.
      first_step: seconds from the process's start until the line of its first step was there.
      peak_rss: most bytes that were resident, of the whole process...
      peak_rss_steps: ... and up to the last step that was wanted.
    """

    lines: list[Line]
    measured: list[Line]
    about: dict[str, Any]
    first_step: float
    peak_rss: int
    peak_rss_steps: int


class Before(NamedTuple):
    """The preparation before an arm's first round: `jdpo reference`."""

    seconds: float
    peak_rss: int


class ArmFailed(RuntimeError):
    """Raised if an arm ends early; `last` is the last line that it printed."""

    def __init__(self, name: str, code: int, left: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()
        self.name, self.last = name, next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        super().__init__(f"{name} ended with {code} {left}; {log}:\n" + "\n".join(lines[-15:]))


def missing(python: str, modules: Sequence[str]) -> str | None:
    """Returns why an arm cannot run, the last line of the import error of its modules; None if it can."""
    done = subprocess.run(
        [python, "-c", f"import {', '.join(modules)}"], capture_output=True, text=True, env=environment("cpu")
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it could not be imported"])[-1]


def environment(device: str, compilation_cache: Path | None = None) -> dict[str, str]:
    """Returns the environment of every arm: offline, with a compilation cache of its own."""
    # The same share of a GPU for all; jax refuses to start with the old name of the variable next to the new one.
    values = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    values |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "XLA_CLIENT_MEM_FRACTION": "0.95"}
    if device == "cpu":
        values["JAX_PLATFORMS"] = "cpu"
    if compilation_cache is not None:
        values["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache)
    return values


def prepare_arm(arm: Arm, out: Path, *, device: str) -> Before:
    """Runs what an arm needs before its first round.

    Raises:
      ArmFailed: it did not end with 0.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    log, started = out.with_suffix(".log"), time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen(
            arm.before,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment(device, out.parent / "compiled-before"),
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ArmFailed(shlex.join(arm.before[:4]), process.returncode, "before the first round", log)
    return Before(time.perf_counter() - started, usage.ru_maxrss * 1024)


def run_arm(arm: Arm, out: Path, *, device: str) -> ArmRun:
    """Runs an arm until it has written the required lines, and waits for its end.

    Args:
      out: a new folder; its parent keeps the arm's compilation cache from one run to the next.

    Raises:
      ArmFailed: the process failed, or left fewer lines.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    log, metrics = out.with_suffix(".log"), out / "metrics.jsonl"
    started = time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen(
            [*arm.command, arm.out_flag, str(out)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment(device, out.parent / "compiled"),
        )
        first_step, peak_rss_steps, peak_rss = _watch(process, arm, metrics, started)
    lines = read_lines(metrics)
    stopped = (0, 128 + signal.SIGTERM) if arm.endless else (0,)
    if process.returncode not in stopped or len(lines) < arm.num_lines:
        raise ArmFailed(arm.name, process.returncode, f"after {len(lines)} of {arm.num_lines} steps", log)
    about = out / "about.json"
    facts = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    lines = lines[: arm.num_lines]
    run = ArmRun(lines, lines[-arm.num_measured :], facts, first_step, peak_rss, peak_rss_steps)
    seconds = " ".join(f"{line['step_seconds']:.3g}" for line in lines)
    print(f"{arm.name}: steps of {seconds} s, the first after {first_step:.1f} s", file=sys.stderr, flush=True)
    return run


def _watch(process: subprocess.Popen[Any], arm: Arm, metrics: Path, started: float) -> tuple[float, int, int]:
    """Waits for the end of a process; returns (first_step, peak_rss_steps, peak_rss) of ArmRun."""
    first_step, resident, told = float("nan"), 0, False
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return first_step, resident, usage.ru_maxrss * 1024
            count = len(read_lines(metrics))
            if count and first_step != first_step:
                first_step = time.perf_counter() - started
            if not told:
                resident = max(resident, _peak_resident(process.pid))
            if count >= arm.num_lines and not told:
                told = True
                if arm.endless:
                    process.terminate()
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.kill()
        raise


def _peak_resident(pid: int) -> int:
    """Returns the peak resident bytes of a process so far; 0 if Linux does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def read_lines(path: Path) -> list[Line]:
    """Returns the training steps of a metrics.jsonl that is still being written."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n") and "step_seconds" in (line := json.loads(text)):
            lines.append(line)
    return lines
