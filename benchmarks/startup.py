"""Claim: what a training of a toy takes besides its steps, and that it is less than at an earlier commit.

    python benchmarks/startup.py [--against CHECKOUT] [--rounds 3] [--report FILE]

Five trainings of 60 steps in one process, of a Llama of 0.4 million parameters: SFT, DPO, the same DPO once more, and
two with another beta, of which the last exports nothing where `export_at_end` exists. Each round runs this process
twice, with an empty cache of compiled programs and then with the one that the first has left, and takes turns with the
checkout that `--against` names, such as a `git worktree` of an earlier commit. Tables hold medians of the rounds.

Where other processes use the cores, CPU seconds tell more than seconds. `programs` counts what XLA compiled, small
programs included; a program that the cache held is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT if "--arm" not in sys.argv else os.environ["JDPO_CHECKOUT"]))

WORDS = ("river", "mountain", "paper", "winter", "green", "seven", "slow", "market")
TRAININGS = ("sft", "dpo", "dpo again", "beta 0.5", "beta 0.3, no export")
CACHES = ("cold", "warm")
IN_SECONDS = ("wall", "cpu", "trace", "compile")


# --- one process with all trainings


def run_arm(folder: Path, runs: Path, steps: int) -> list[dict[str, Any]]:
    """Trains everything in this process and returns one row per training, after one for the imports."""
    began = time.perf_counter(), cpu_seconds()
    import jax

    import jdpo

    # Named here, as names of the package are imported when they are first used.
    train, configs = jdpo.train, (jdpo.SFTConfig, jdpo.DPOConfig)
    rows = [{"name": "imports", "wall": time.perf_counter() - began[0], "cpu": cpu_seconds() - began[1]}]
    events: list[tuple[str, float]] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append((event, seconds)))
    for name in TRAININGS:
        config = config_of(name, folder, runs / name.replace(" ", "-").replace(",", ""), configs, steps)
        events.clear()
        began = time.perf_counter(), cpu_seconds()
        train(config)
        row = {"name": name, "wall": time.perf_counter() - began[0], "cpu": cpu_seconds() - began[1]}
        record = json.loads((Path(config.output_dir) / "run.json").read_text(encoding="utf-8"))
        rows.append({**row, **compiled(events), "timing": record.get("timing", {})})
    return rows


def config_of(name: str, folder: Path, output_dir: Path, configs: tuple[Any, Any], steps: int) -> Any:
    """Returns the config of a training; DPO starts from what SFT has exported."""
    sft, dpo = configs
    common = {
        "output_dir": str(output_dir),
        "cache_dir": str(folder / "cache"),
        "max_length": 64,
        "global_batch_size": 16,
        "max_steps": steps,
        "learning_rate": 1e-3,
    }
    if name == "sft":
        return sft(model_name_or_path=str(folder / "model"), datasets=str(folder / "sft.jsonl"), **common)
    beta = float(name.split(",")[0].removeprefix("beta ")) if name.startswith("beta") else 0.1
    known = {field.name for field in dataclasses.fields(dpo)}
    quiet = {"export_at_end": False} if name.endswith("no export") and "export_at_end" in known else {}
    return dpo(
        model_name_or_path=str(output_dir.parent / "sft" / "model"),
        datasets=str(folder / "pairs.jsonl"),
        eval_datasets=str(folder / "held_out.jsonl"),
        eval_steps=max(steps // 3, 1),
        beta=beta,
        **common,
        **quiet,
    )


def compiled(events: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Returns the seconds that threads spent on tracing and on compiling, and the number of compiled programs."""

    def of(*names: str) -> list[float]:
        return [seconds for event, seconds in events if event.rsplit("/", 1)[-1] in names]

    found = len(of("cache_retrieval_time_sec"))
    return {
        "trace": sum(of("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")),
        "compile": sum(of("backend_compile_duration")),
        "programs": len(of("backend_compile_duration")) - found,
    }


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- inputs, rounds, report


def write_inputs(folder: Path) -> None:
    """Writes model and rows; every side reads the same."""
    from jdpo.quickstart.tiny_llama import write_model

    rng = random.Random(0)

    def turn(role: str, num_words: int, end: str = ".") -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=num_words)) + end}]

    pairs = [
        {"prompt": turn("user", 6), "chosen": turn("assistant", 4, " yes"), "rejected": turn("assistant", 5, " no")}
        for _ in range(320)
    ]
    completions = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, rows in (("pairs", pairs[:300]), ("held_out", pairs[300:]), ("sft", completions[:300])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(50)]
    write_model(folder / "model", texts, hidden_size=128, num_layers=2, seed=0)


def start_arm(checkout: Path, folder: Path, runs: Path, steps: int) -> list[dict[str, Any]]:
    """Runs `run_arm` in a process of its own, with the package of a checkout."""
    words = [str(Path(__file__).resolve()), "--arm", str(folder), str(runs), "--steps", str(steps)]
    environment = os.environ | {"JDPO_CHECKOUT": str(checkout), "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = json.loads((runs / "rows.json").read_text(encoding="utf-8"))
    return rows


def measure(sides: dict[str, Path], rounds: int, steps: int) -> dict[tuple[str, str], list[list[dict[str, Any]]]]:
    """Returns, for each side and state of the cache, the rows of each round."""
    found: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for number in range(rounds):
        for side, checkout in sides.items():
            with tempfile.TemporaryDirectory(prefix="startup-") as name:
                folder = Path(name)
                write_inputs(folder)
                for cache in CACHES:
                    (folder / cache).mkdir()
                    rows = start_arm(checkout, folder, folder / cache, steps)
                    found.setdefault((side, cache), []).append(rows)
                    total = sum(row["cpu"] for row in rows)
                    print(f"round {number + 1}, {side}, {cache}: {total:.1f} CPU seconds", file=sys.stderr, flush=True)
    return found


def report(found: dict[tuple[str, str], list[list[dict[str, Any]]]], sides: Sequence[str]) -> str:
    """Returns the tables."""
    lines = ["| cache | training | side | seconds | CPU s | tracing s | compiling s | programs |", "|---" * 8 + "|"]
    for cache in CACHES:
        for index, name in enumerate(("imports", *TRAININGS)):
            for side in sides:
                rows = [of_round[index] for of_round in found[side, cache]]
                figures = [f"{median(row.get(key, 0.0) for row in rows):.1f}" for key in IN_SECONDS]
                programs = round(median(row.get("programs", 0) for row in rows))
                lines.append(f"| {cache} | {name} | {side} | {' | '.join(figures)} | {programs} |")
        totals = {side: median(sum(row["cpu"] for row in rows) for rows in found[side, cache]) for side in sides}
        ratio = f" ({totals[sides[0]] / totals[sides[1]]:.2f} times)" if len(sides) > 1 else ""
        listed = " | ".join(f"{side} {total:.1f}" for side, total in totals.items())
        lines.append(f"| {cache} | all, CPU s | {listed.replace(' | ', ', ')}{ratio} | | | | | |")
    lines += ["", "Seconds per phase, from `run.json`:", ""]
    phases = list(dict.fromkeys(p for rows in found[sides[-1], "cold"] for row in rows for p in row.get("timing", {})))
    lines += [f"| cache | training | {' | '.join(phases)} |", "|---" * (2 + len(phases)) + "|"]
    for cache in CACHES:
        for index, name in enumerate(TRAININGS, start=1):
            rows = [of_round[index]["timing"] for of_round in found[sides[-1], cache]]
            figures = [f"{median(timing.get(phase, 0.0) for timing in rows):.2f}" for phase in phases]
            lines.append(f"| {cache} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the rounds and prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--report", type=Path, help="also write the tables to this file")
    parser.add_argument("--arm", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        folder, runs = arguments.arm
        (runs / "rows.json").write_text(json.dumps(run_arm(folder, runs, arguments.steps)), encoding="utf-8")
        return 0
    from machine import machine_line

    sides = {"before": arguments.against.resolve()} if arguments.against else {}
    sides["now"] = ROOT
    before = os.getloadavg()[0]
    tables = report(measure(sides, arguments.rounds, arguments.steps), list(sides))
    loads = f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    text = f"Machine: {machine_line()}; {loads}. Medians of {arguments.rounds} rounds.\n\n{tables}"
    print(text, end="")
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
