"""A million rows through the data path: time and memory of the first start and of the second, and the loader's speed.

    python benchmarks/data_path.py [--rows N] [--work DIR] [--num_proc P] [--pairs_per_second X] [--out REPORT.md]

Rows of random words are written as conversational JSONL, tokenized and planned, and both again from the cache; then
steps of 32 pairs are made and packed as fast as they come. Every stage is a separate process, whose resident memory
includes that of its child processes. Unless --pairs_per_second gives what a model consumes, `jdpo dpo` trains a model
of 20 M parameters for a few steps on the first rows. The exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

STEP_ROWS = 32
MAX_LENGTH = 256
LOADER_STEPS = 500
MODEL_ROWS, MODEL_STEPS, WARM_UP = 320, 10, 3
MEMORY_BAR = 2.0
"""Most GiB that the first start holds, the processes that tokenize included."""
SECOND_START_BAR = 10.0
"""Most seconds of the second start: imports, finding the rows, and planning an epoch."""
LOADER_BAR = 20.0
"""Least pairs per second of the loader, over those that the model consumes."""


# --- what goes in


def write_rows(path: Path, num_rows: int, *, seed: int = 0) -> None:
    """Writes conversational pairs of 15 to 90 random words per row; every word has its own frequency."""
    rng = np.random.default_rng(seed)
    words = vocabulary()
    frequency = 1 / np.arange(1, len(words) + 1)
    stream = _words(rng, words, frequency / frequency.sum())
    with path.open("w", encoding="utf-8") as file:
        for prompt, chosen, rejected in rng.integers((5, 5, 5), (40, 25, 25), (num_rows, 3)):
            row = {
                "prompt": [{"role": "user", "content": _sentence(stream, prompt)}],
                "chosen": [{"role": "assistant", "content": _sentence(stream, chosen)}],
                "rejected": [{"role": "assistant", "content": _sentence(stream, rejected)}],
            }
            file.write(json.dumps(row) + "\n")


def vocabulary() -> list[str]:
    """Returns 2,000 made-up words."""
    syllables = [first + second for first in "bcdfghklmnprstvw" for second in "aeiou"]
    return [one + two for one in syllables for two in syllables][:2000]


def _words(rng: np.random.Generator, words: list[str], frequency: np.ndarray) -> Iterator[str]:
    while True:
        for index in rng.choice(len(words), 100_000, p=frequency):
            yield words[index]


def _sentence(stream: Iterator[str], num_words: int) -> str:
    return " ".join(next(stream) for _ in range(num_words)) + "."


def write_model(folder: Path) -> None:
    """Writes a random Llama of 20 M parameters and a tokenizer that knows the words."""
    from jdpo.quickstart import tiny_llama

    words = vocabulary()
    texts = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)] * 20
    tiny_llama.write_model(folder, texts, hidden_size=384, num_layers=11, seed=0)


# --- stages, each in a process of its own


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokenizes (or finds) the rows and plans every step of an epoch."""
    from jdpo.data.batching.loader import RowPlan
    from jdpo.data.batching.mixing import Mixture
    from jdpo.data.batching.packing_plan import plan_run

    began = time.perf_counter()
    data = prepared(arguments)
    tokenized = time.perf_counter()
    plan = RowPlan(Mixture((len(data),), (len(data),)), global_batch_size=STEP_ROWS, seed=0, shuffle=True)
    steps = (plan.step(step) for step in range(plan.steps_per_epoch))
    packing = plan_run(data.sizes(), steps, num_shards=1, max_tokens_per_device=4096, sequences_per_row=None)
    planned = time.perf_counter()
    return {
        "rows": len(data),
        "from_cache": data.from_cache,
        "tokens": int(data.sizes().slots.sum()),
        "prepare_seconds": tokenized - began,
        "plan_seconds": planned - tokenized,
        "shapes": len(packing.shapes),
    }


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes and packs steps one after the other on one thread, as the training loop's loader does."""
    from jdpo.config import DPOConfig, load_config
    from jdpo.data.batching.loader import RowPlan
    from jdpo.data.batching.mixing import Mixture
    from jdpo.training.setup.batches import PackedBatches
    from jdpo.training.setup.tasks import task_for

    data = prepared(arguments)
    task = task_for(load_config(DPOConfig, None, ["model_name_or_path=m", "output_dir=o", "datasets=d"]))
    plan = RowPlan(Mixture((len(data),), (len(data),)), global_batch_size=STEP_ROWS, seed=0, shuffle=True)
    num_steps = min(LOADER_STEPS, plan.steps_per_epoch)
    steps = [plan.step(step) for step in range(num_steps)]
    batches = PackedBatches(task, data, steps, num_shards=1, max_tokens_per_device=4096, sequences_per_row=None)
    began = time.perf_counter()
    for step in range(num_steps):
        batches.make(plan.step(step))
    seconds = time.perf_counter() - began
    return {"pairs_per_second": sum(map(len, steps)) / seconds, "step_seconds": seconds / num_steps}


def consume(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the model on the first rows with the loader of a run."""
    from jdpo.config import DPOConfig, load_config
    from jdpo.models.families import read_model_config
    from jdpo.models.transformer import Transformer, abstract_params
    from jdpo.reports.metrics_file import read_metrics
    from jdpo.training.run import train

    words = {
        "model_name_or_path": arguments.work / "model",
        "output_dir": tempfile.mkdtemp(dir=arguments.work, prefix="run-"),
        "datasets": f"[{{path: {arguments.work / 'rows.jsonl'}, split: 'train[:{MODEL_ROWS}]'}}]",
        "cache_dir": arguments.work / "cache",
        "max_length": MAX_LENGTH,
        "global_batch_size": STEP_ROWS,
        "max_steps": MODEL_STEPS,
        "logging_steps": 1,
        "reference": "live",
    }
    run = train(load_config(DPOConfig, None, [f"{key}={value}" for key, value in words.items()]))
    lines = read_metrics(run.output_dir / "metrics.jsonl")
    rates = [line["pairs_per_second"] for line in lines if "pairs_per_second" in line]
    import jax

    model = Transformer(read_model_config(arguments.work / "model"))
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    return {"pairs_per_second": statistics.median(rates[WARM_UP:]), "parameters": size}


def prepared(arguments: argparse.Namespace) -> Any:
    from jdpo.config import DatasetConfig
    from jdpo.data.prepared.prepare import prepare_pairs
    from jdpo.data.tokens.tokenizer import load_tokenizer

    return prepare_pairs(
        [DatasetConfig(path=str(arguments.work / "rows.jsonl"))],
        load_tokenizer(arguments.work / "model", chat_template=None),
        max_length=MAX_LENGTH,
        cache_dir=arguments.work / "cache",
        num_proc=arguments.num_proc,
    )


STAGES = {"start": start, "load": load, "consume": consume}


# --- the stages, watched


def run_stage(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a stage; returns its results, its seconds and its peak resident memory in GiB."""
    command = [sys.executable, __file__, "--stage", name, "--work", str(arguments.work)]
    if arguments.num_proc is not None:
        command += ["--num_proc", str(arguments.num_proc)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    peak = [0, 0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"stage {name} ended with exit code {process.returncode}")
    watcher.join()
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    gibibytes = [value / 2**30 for value in peak]
    return {**found, "seconds": time.perf_counter() - began, "peak_gib": gibibytes[0], "peak_all_gib": gibibytes[1]}


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Records the peak memory of the process alone, and together with its child processes."""
    while process.poll() is None:
        own = _resident(process.pid)
        peak[0] = max(peak[0], own)
        peak[1] = max(peak[1], own + sum(map(_resident, _descendants(process.pid))))
        time.sleep(0.2)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield child
        yield from _descendants(child)


# --- the report


def report(rows: int, found: dict[str, dict[str, Any]], file_bytes: int) -> tuple[str, bool]:
    """Returns the report as Markdown, and whether every bar is met."""
    first, second, loader, model = (found[name] for name in ("first", "second", "load", "consume"))
    ratio = loader["pairs_per_second"] / model["pairs_per_second"]
    verdicts = [
        ("peak resident memory of the first start, GiB", first["peak_all_gib"], "<", MEMORY_BAR),
        ("seconds of the second start", second["seconds"], "<", SECOND_START_BAR),
        ("loader over model, pairs per second", ratio, ">=", LOADER_BAR),
    ]
    met = [value < bar if sign == "<" else value >= bar for _, value, sign, bar in verdicts]
    machine = f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}"
    lines = [
        f"# {rows:,} rows through the data path",
        "",
        f"`python benchmarks/data_path.py --rows {rows}`, {machine}, {datetime.date.today()}. Load of the machine at "
        f"the end: {os.getloadavg()[2]:.1f} over 15 minutes.",
        "",
        f"{file_bytes / 2**20:,.0f} MiB of JSONL, {first['tokens']:,} tokens (each prompt once). Memory is resident, "
        "of the process alone and with all processes that it started (shared pages count in each).",
        "",
        "| stage | seconds, imports included | tokenizing or finding | planning an epoch | peak GiB | with all |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in (("first start", first), ("second start", second)):
        parts = (stage["prepare_seconds"], stage["plan_seconds"], stage["peak_gib"], stage["peak_all_gib"])
        lines.append(f"| {name} | {stage['seconds']:.1f} | {' | '.join(f'{value:.2f}' for value in parts)} |")
    lines += [
        "",
        f"Tokenizing: {rows / first['prepare_seconds']:,.0f} rows per second. Loader (plan, read, pack; one thread): "
        f"{loader['pairs_per_second']:,.0f} pairs per second, {loader['step_seconds'] * 1e3:.1f} ms per step of "
        f"{STEP_ROWS}, peak {loader['peak_gib']:.2f} GiB. A model of {model['parameters']:,} parameters consumes "
        f"{model['pairs_per_second']:.1f} pairs per second.",
        "",
        "| bar | found | wanted | |",
        "|---|---|---|---|",
    ]
    for (what, value, sign, bar), passed in zip(verdicts, met, strict=True):
        lines.append(f"| {what} | {value:.2f} | {sign} {bar:g} | {'met' if passed else 'MISSED'} |")
    return "\n".join(lines) + "\n", all(met)


def main() -> int:
    """Runs all stages; the exit code is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="folder for rows, model and cache; default: a temporary one")
    parser.add_argument("--num_proc", type=int, help="processes that tokenize; default: as a run has")
    parser.add_argument("--pairs_per_second", type=float, help="what a model consumes, in place of training one")
    parser.add_argument("--out", type=Path, help="file for the report, in addition to standard output")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](arguments)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        arguments.work.mkdir(parents=True, exist_ok=True)
        rows = arguments.work / "rows.jsonl"
        if not rows.exists():
            write_rows(rows, arguments.rows)
        if not (arguments.work / "model").exists():
            write_model(arguments.work / "model")
        found = {"first": run_stage("start", arguments), "second": run_stage("start", arguments)}
        assert (found["first"]["from_cache"], found["second"]["from_cache"]) == (False, True), "the cache was not empty"
        found["load"] = run_stage("load", arguments)
        if arguments.pairs_per_second is None:
            found["consume"] = run_stage("consume", arguments)
        else:
            found["consume"] = {"pairs_per_second": arguments.pairs_per_second, "parameters": 20_000_000}
        text, passed = report(arguments.rows, found, rows.stat().st_size)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
