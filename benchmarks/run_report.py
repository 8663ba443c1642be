"""The page of a run: its size and the CPU time to make it, by the number of logged lines and of compared runs.

    python benchmarks/run_report.py [--lines 1000 10000 100000] [--runs 1 5]

The lines have 20 metrics of noise, as those of a long run. Prints a table as Markdown. Exits with 1 if a page takes
3 MB or more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine_line

from jdpo.config import CONFIGS, load_config, to_public_yaml
from jdpo.training.pages.run_report import write_report
from jdpo.training.run_record import RunRecord

MOST_BYTES = 3_000_000
METRICS = (
    *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen"),
    *("logps/rejected", "grad_norm", "grad_clipped", "padding", "learning_rate", "num_tokens", "pairs_per_second"),
    *("tokens_per_second", "step_seconds", "model_tflops_per_second", "mfu", "mfu_executed", "peak_memory_gib"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5])
    asked = parser.parse_args()
    print(machine_line(), "", "| lines per run | runs | CPU seconds | MB |", "|---:|---:|---:|---:|", sep="\n")
    largest = 0
    with tempfile.TemporaryDirectory() as folder:
        for num_lines in asked.lines:
            runs = [write_run(Path(folder) / f"{num_lines}-{number}", num_lines) for number in range(max(asked.runs))]
            for num_runs in asked.runs:
                page = Path(folder) / "page.html"
                began = time.process_time()
                write_report(runs[:num_runs], page)
                seconds, size = time.process_time() - began, page.stat().st_size
                print(f"| {num_lines:,} | {num_runs} | {seconds:.2f} | {size / 1e6:.2f} |", flush=True)
                largest = max(largest, size)
    return int(largest >= MOST_BYTES)


def write_run(folder: Path, num_lines: int) -> Path:
    """Writes the folder of a finished run with an evaluation every ten lines."""
    folder.mkdir()
    rng = np.random.default_rng(num_lines)
    words = ["model_name_or_path=model", "datasets=pairs.jsonl", f"output_dir={folder}"]
    (folder / "resolved_config.yaml").write_text(to_public_yaml(load_config(CONFIGS["dpo"], None, words)))
    RunRecord(command="dpo", finished=True, results={"step": num_lines}).write(folder / "run.json")
    with (folder / "metrics.jsonl").open("w") as file:
        for step, values in enumerate(rng.lognormal(size=(num_lines, len(METRICS))).tolist(), start=1):
            file.write(json.dumps({"step": step, **dict(zip(METRICS, values, strict=True))}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval_loss": values[0], "eval_rewards/margins": values[2]}) + "\n")
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
