"""The same small run on this device and on its CPU, in float32: losses and log-probs of every step."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from part_process import HERE, environment, run_process
from small_runs import Inputs, SmallRun, write_inputs

NUM_STEPS = 8

BARS = {"float32": {"first": 2e-5, "loss": 1e-4, "logps": 1e-4}, "bfloat16": {"loss": 2e-2, "logps": 1e-2}}
"""Largest relative differences from float32 on the CPU, by the dtype on the device: `first` of the log-probs of the
first step, before any update, then of all steps. Adam moves a weight by the sign of its gradient in the first steps, so
the rounding of gradients near zero shows later. bfloat16 has 8 bits of precision, and is what runs on the kernels."""

LOGPS = ("logps/chosen", "logps/rejected")


def run(name: str, request: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Measures the part."""
    scratch, seconds = Path(request["scratch"]), request["seconds"]
    inputs = write_inputs(scratch, tiny=request["tiny"], num_pairs=24)
    # The CPU's run and the device's use different processors, so they run at the same time.
    with ThreadPoolExecutor() as pool:
        on_cpu = pool.submit(train_apart, inputs, scratch / "cpu", "float32", seconds=seconds, platform="cpu")
        on_device = {dtype: train_apart(inputs, scratch / dtype, dtype, seconds=seconds) for dtype in BARS}
        expected = on_cpu.result()
    result: dict[str, Any] = {"num_steps": NUM_STEPS, "bars": BARS, "checks": {}}
    for dtype, bars in BARS.items():
        found = on_device[dtype]
        result["device_kind"] = found["device_kind"]
        apart = differences(found["lines"], expected["lines"])
        result[dtype] = {**apart, "losses": [line["loss"] for line in found["lines"]]}
        result["checks"] |= {f"{dtype} {what}": apart[what] <= bar for what, bar in bars.items()}
    result["cpu"] = {"losses": [line["loss"] for line in expected["lines"]]}
    save(result)


def train_apart(
    inputs: Inputs,
    folder: Path,
    dtype: str,
    *,
    seconds: float,
    platform: str | None = None,
    stop_at: int | None = None,
    flags: str = "",
) -> dict[str, Any]:
    """Trains the small model in a process of its own.

    Args:
      folder: of the run.
      seconds: that it may take.
      platform: default: that of this process.
      flags: for XLA_FLAGS, in addition to the user's own.

    Raises:
      RuntimeError: the process failed; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = SmallRun(inputs, folder / "run", NUM_STEPS, dtype, folder / f"result-{stop_at}.json", stop_at)
    log = folder / f"log-{stop_at}.txt"
    code = run_process(
        [str(HERE / "small_runs.py"), str(run.written())],
        log=log,
        seconds=seconds,
        environment=environment(platform, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()),
    )
    if code != 0:
        printed = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print(*printed[-15:], sep="\n")
        # XLA's fatal errors begin so, and end in a stack trace.
        fatal = next((line for line in printed if re.match(r"F\d{4}", line)), printed[-1] if printed else "no output")
        raise RuntimeError(f"a run in {dtype} on {platform or 'the device'} ended with {code}: {fatal}")
    found: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
    return found


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the largest relative differences: `loss`, `logps`, and `first`, the log-probs of the first step."""

    def apart(names: tuple[str, ...], steps: slice) -> float:
        ours, theirs = (
            np.array([[line[name] for name in names] for line in lines[steps]]) for lines in (found, expected)
        )
        # A run that lacks a step is as far apart as can be.
        if ours.shape != theirs.shape:
            return float("inf")
        largest = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
        return largest if np.isfinite(largest) else float("inf")

    everything = slice(None)
    return {"first": apart(LOGPS, slice(1)), "loss": apart(("loss",), everything), "logps": apart(LOGPS, everything)}
