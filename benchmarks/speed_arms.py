"""The arms of the speed benchmark: one command each, run in a process of its own and watched from outside.

Every arm leaves a metrics.jsonl with a line a step (`step`, `step_seconds`, `loss`, `logps/chosen`, `logps/rejected`).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speed_cases import Case

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, BETA = 1e-5, 0.1
POLL_SECONDS = 0.05

Line = dict[str, Any]


class Folder(NamedTuple):
    """Where a case's inputs lie and its arms leave theirs."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def rows(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def ids(self) -> Path:
        return self.root / "ids.jsonl"


class Arm(NamedTuple):
    """A trainer with its settings.

    Attributes:
      name: as in the report.
      trainer: jdpo, trl or tunix.
      reference: live or cached.
      command: what runs it, but for where it writes.
      out_flag: the flag that takes the folder it writes to.
      endless: whether it trains on past the last step that is wanted, and is then told to stop.
      before: a command to be run once before the first round: `jdpo reference`.
      cold_steps: steps of a run before the first round; 0: none. jdpo compiles in the background while the first steps
        run, so its rounds come after a run in which every shape of the epoch was compiled and kept...
      skipped: ... and it is measured on its second pass over the rows, when every program has been loaded again: steps
        between the warm-up and those that are measured.
      rounds: rounds at most.
    """

    name: str
    trainer: str
    reference: str
    command: tuple[str, ...]
    out_flag: str = "--out"
    endless: bool = False
    before: tuple[str, ...] = ()
    cold_steps: int = 0
    skipped: int = 0
    rounds: int = 99


class ArmRun(NamedTuple):
    """What a process left.

    Attributes:
      lines: of metrics.jsonl, one a step.
      about: of about.json; empty where there is none.
      first_step: seconds from the process's start until the line of its first step was there.
      peak_rss: most bytes that were resident, of the whole process...
      peak_rss_steps: ... and up to the last step that was wanted.
    """

    lines: list[Line]
    about: dict[str, Any]
    first_step: float
    peak_rss: int
    peak_rss_steps: int


def jdpo_arm(python: str, case: Case, folder: Folder, reference: str, *, epoch: int) -> Arm:
    """`jdpo dpo`, on all rows of the benchmark: its shapes are planned for an epoch, not for what is measured."""
    settings = {
        "model_name_or_path": folder.model,
        "datasets": folder.rows,
        "cache_dir": folder.root / f"jdpo-{reference}-cache",
        "max_length": case.max_length,
        "global_batch_size": case.batch,
        "shuffle": "false",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "compute_dtype": "float32" if case.device == "cpu" else "bfloat16",
        "logging_steps": 1,
        "reference": reference,
        "num_train_epochs": 2,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    command = (python, "-m", "jdpo.cli.main", "dpo", *words, *case.jdpo)
    before = (python, "-m", "jdpo.cli.main", "reference", *words, *case.jdpo) if reference == "cached" else ()
    name = f"jdpo, {reference} reference"
    return Arm(
        name,
        "jdpo",
        reference,
        command,
        "--output_dir",
        endless=True,
        before=before,
        cold_steps=epoch,
        skipped=epoch,
    )


def trl_arm(
    python: str, case: Case, folder: Folder, reference: str, attention: str, *, steps: int, liger: bool = False
) -> Arm:
    """TRL's DPOTrainer."""
    flags = {
        "model": folder.model,
        "rows": folder.rows,
        "steps": steps,
        "batch": case.batch,
        "micro_batch": case.trl_micro_batch or case.batch,
        "max_length": case.max_length,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "attention": attention,
        "reference": "live" if reference == "live" else "precomputed",
        "device": case.device,
        "dtype": case.shape.dtype,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    how = f"{attention} + Liger" if liger else attention
    name = f"TRL, {flags['reference']} reference ({how})"
    command = (python, str(ROOT / "benchmarks/speed_trl.py"), *words, *(["--liger"] if liger else []), "--tokens")
    return Arm(name, "trl", reference, command)


def tunix_arm(python: str, case: Case, folder: Folder, *, steps: int) -> Arm:
    """Tunix's DPOTrainer, which has a live reference only."""
    flags = {
        "model": folder.model,
        "ids": folder.ids,
        "steps": steps,
        "batch": case.batch,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = (python, str(ROOT / "benchmarks/speed_tunix.py"), *words)
    return Arm("Tunix, live reference", "tunix", "live", command, rounds=1)  # it does most steps twice


def missing(python: str, modules: Sequence[str]) -> str | None:
    """Why an arm cannot run: the last line of what python says on importing its modules; None where it can."""
    done = subprocess.run(
        [python, "-c", f"import {', '.join(modules)}"], capture_output=True, text=True, env=environment("cpu")
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it could not be imported"])[-1]


def environment(device: str, compilation_cache: Path | None = None) -> dict[str, str]:
    """Of every arm: offline, and with a compilation cache that is the arm's own."""
    values = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if device == "cpu":
        values["JAX_PLATFORMS"] = "cpu"
    if compilation_cache is not None:
        values["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache)
    return values


def prepare_arm(arm: Arm, out: Path, *, device: str) -> float:
    """Runs what an arm needs before its first round; its seconds.

    Raises:
      RuntimeError: it failed; the end of what it printed is in the message.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    log, started = out.with_suffix(".log"), time.perf_counter()
    with log.open("w") as printed:
        values = environment(device, out.parent / "compiled-before")
        done = subprocess.run(arm.before, stdout=printed, stderr=subprocess.STDOUT, env=values)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(arm.before)} ended with {done.returncode}; {log}:\n{_tail(log)}")
    return time.perf_counter() - started


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def run_arm(arm: Arm, out: Path, *, steps: int, device: str, cold: bool = False) -> ArmRun:
    """Runs an arm until it has left the lines that are wanted, and to its end.

    Args:
      steps: lines that are wanted: the first, and behind what the arm skips the others.
      cold: whether nothing is skipped.
      out: a new folder; its parent keeps the arm's compilation cache from one run to the next.

    Raises:
      RuntimeError: the process failed, or left fewer lines; the end of what it printed is in the message.
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
        skipped = 0 if cold else arm.skipped
        first_step, peak_rss_steps, peak_rss = _watch(process, arm, metrics, steps + skipped, started)
    lines = read_lines(metrics)
    stopped = (0, 128 + signal.SIGTERM) if arm.endless else (0,)
    if process.returncode not in stopped or len(lines) < steps + skipped:
        raise RuntimeError(
            f"{arm.name} ended with {process.returncode} after {len(lines)} of {steps + skipped} steps; "
            f"{log}:\n{_tail(log)}"
        )
    about = out / "about.json"
    facts = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    return ArmRun([lines[0], *lines[skipped + 1 : skipped + steps]], facts, first_step, peak_rss, peak_rss_steps)


def _watch(
    process: subprocess.Popen[Any], arm: Arm, metrics: Path, steps: int, started: float
) -> tuple[float, int, int]:
    """Waits for the end of a process; (first_step, peak_rss_steps, peak_rss) of ArmRun."""
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
            if count >= steps and not told:
                told = True
                if arm.endless:
                    process.terminate()
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.kill()
        raise


def _peak_resident(pid: int) -> int:
    """Most bytes that a process had resident so far; 0 where Linux does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def read_lines(path: Path) -> list[Line]:
    """The training steps of a metrics.jsonl that is still being written."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n") and "step_seconds" in (line := json.loads(text)):
            lines.append(line)
    return lines
