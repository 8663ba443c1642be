"""Checks and measures jdpo on the accelerator of this machine in less than nine minutes, without any network.

    pip install .[cuda]    # or .[tpu]; nothing else is needed
    python scripts/device_check [--on gpu|tpu] [--out DIR] [--budget 510]

Run it on a host with one or more NVIDIA GPUs (A100, H100, H200), or on a TPU VM of a single host (v5e, v5p, v6e).
Models have their true sizes and random weights, rows have the lengths of real ones and random words. The parts, each in
a process of its own:

- machine: devices, memory, versions, and the rates of a large matrix product and of a copy.
- parity (check): a small model trained on this device and on its CPU, in float32: equal losses and log-probs.
- resume (check): a run that was stopped and resumed is the uninterrupted one, bitwise, with deterministic operations.
- full: full fine-tuning of the largest model of a list that fits (1.5B on one large GPU): time per step, MFU, tokens
  per second, peak memory next to jdpo's own figure, and the attention kernels in the program (check).
- lora: the same for LoRA (8B on one large GPU).
- compare, if time is left: remat policies, sizes of the head's chunks, and attention kernels.

A part that fails is recorded with its error, and the others still run. No part is started when the budget is used up.
Results are one JSON file per part and summary.md, in --out, in $OUT, or in benchmarks/results/device/DATE-KIND (with
--tiny in runs/device/DATE-KIND, which git ignores). The exit code is 0 if every part that was asked for, except
`compare`, ran and every check passed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# This checkout's jdpo, installed or not, and the parts of its benchmarks that are used here.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from check_summary import failures, write_summary  # noqa: E402
from part_process import Limits, run_part  # noqa: E402
from part_table import PARTS, Part  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts that the command line asks for; returns the exit code."""
    arguments = parse(words)
    # An exception, so that the process of a part is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    # The first part says which device this is, which others ask for.
    asked = [part for part in PARTS if part.name in ("machine", *arguments.parts)]
    results: dict[str, dict[str, Any]] = {}
    out: Path | None = arguments.out
    for part in asked:
        left = arguments.budget - (time.monotonic() - started)
        if left < part.least_seconds(tiny=arguments.tiny):
            say(f"{part.name}: not started, {max(left, 0):.0f} s of the budget are left")
            results[part.name] = {"status": "not started", "reason": f"{max(left, 0):.0f} s of the budget were left"}
        else:
            say(f"{part.name}: {part.title} (at most {left:.0f} s)")
            results[part.name] = run_part(part.name, request(arguments, results, left), Limits(left, arguments.on), say)
            say(f"{part.name}: {outcome(part, results[part.name])}")
        out = out or default_folder(results, tiny=arguments.tiny)
        write_summary(out, asked, results, command=" ".join(sys.argv[1:]))
    assert out is not None
    failed = failures(asked, results)
    say(f"results: {out / 'summary.md'}; {'failed: ' + ', '.join(failed) if failed else 'everything passed'}")
    return 1 if failed else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--on", choices=("gpu", "tpu", "cpu"), help="the device; default: what jax finds")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    parser.add_argument("--budget", type=float, default=510, help="seconds of the whole script")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="default: all; machine always runs")
    parser.add_argument("--full_model", type=Path, help="folder with the config.json of the model of `full`")
    parser.add_argument("--lora_model", type=Path, help="the same for `lora`")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the whole script on a CPU")
    return parser.parse_args(words)


def request(arguments: argparse.Namespace, results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Returns what a part is told: the settings, the seconds that it has, and the results of the parts before it."""
    models = {"full": arguments.full_model, "lora": arguments.lora_model}
    return {
        "tiny": arguments.tiny,
        "on": arguments.on,
        "models": {name: str(folder) for name, folder in models.items() if folder is not None},
        "seconds": seconds,
        "before": results,
    }


def outcome(part: Part, result: dict[str, Any]) -> str:
    """Returns one line on the outcome of a part."""
    if result["status"] != "done":
        return f"{result['status']}: {result['reason']}"
    failed = [name for name, passed in result.get("checks", {}).items() if not passed]
    return f"failed: {', '.join(failed)}" if failed else part.headline(result)


def default_folder(results: dict[str, dict[str, Any]], *, tiny: bool) -> Path:
    """Returns benchmarks/results/device/DATE-KIND, or runs/device/DATE-KIND for toy sizes, whose times say nothing."""
    kinds = (result.get("device_kind") for result in results.values())
    kind = next((kind for kind in kinds if kind), "unknown")
    name = f"{datetime.date.today().isoformat()}-{kind}".replace(" ", "-").replace("/", "-").lower()
    return ROOT / ("runs/device" if tiny else "benchmarks/results/device") / name


def say(line: str) -> None:
    """Prints a line of progress at once."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
