"""A real run on real rows: a Llama of about 20 million parameters from scratch, SFT then DPO on HH-RLHF dialogues.

    python benchmarks/hh_run.py --data hh_harmless_dev.jsonl.gz [--out runs/hh]

The rows are `chosen`/`rejected` transcripts as in Anthropic's hh-rlhf (harmless-base). The first 90 % are trained on,
the rest held out. Settings are in configs/hh_sft.yaml and configs/hh_dpo.yaml. Prints the report as Markdown.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

from jdpo import __version__
from jdpo.config import DatasetConfig, DPOConfig, SFTConfig, load_config
from jdpo.data.sources import read_rows
from jdpo.quickstart.tiny_llama import write_model
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.interface.run_result import RunResult
from jdpo.training.run import train

CONFIGS = Path(__file__).parent.parent / "configs"


def texts(data: Path) -> list[str]:
    return [row[side] for row, _ in read_rows(DatasetConfig(path=str(data))) for side in ("chosen", "rejected")]


def run(cls: type, name: str, data: Path, out: Path, model: Path) -> tuple[RunResult, float]:
    rows = f"[{{path: {data}, split: 'train[:90%]'}}]"
    held_out = f"[{{path: {data}, split: 'train[90%:]'}}]"
    words = [f"model_name_or_path={model}", f"datasets={rows}", f"eval_datasets={held_out}", f"output_dir={out / name}"]
    started = time.perf_counter()
    result = train(load_config(cls, CONFIGS / f"hh_{name}.yaml", words))
    return result, time.perf_counter() - started


def report(name: str, result: RunResult, seconds: float) -> str:
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    first = next(line for line in lines if "loss" in line)
    shown = [key for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen") if key in first]
    table = [
        f"## {name.upper()}: {result.step} steps, {seconds / 60:.1f} minutes",
        "",
        "| step | set | " + " | ".join(shown) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    marks = {line["step"] for line in lines if "eval_loss" in line} | {first["step"]}
    for line in lines:
        if line["step"] in marks:
            prefix = "eval_" if "eval_loss" in line else ""
            values = " | ".join(f"{line[prefix + key]:.3f}" for key in shown)
            table.append(f"| {line['step']} | {'held-out' if prefix else 'training'} | {values} |")
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hh"))
    args = parser.parse_args()
    base = args.out / "base"
    if not (base / "model.safetensors").exists():
        write_model(base, texts(args.data), hidden_size=448, num_layers=8, seed=0)
    sft, sft_seconds = run(SFTConfig, "sft", args.data, args.out, base)
    assert sft.model_dir is not None
    dpo, dpo_seconds = run(DPOConfig, "dpo", args.data, args.out, sft.model_dir)
    print(
        f"# SFT then DPO on HH-RLHF harmless rows\n\njdpo {__version__}, {platform.processor() or platform.machine()}\n"
    )
    print(report("sft", sft, sft_seconds), report("dpo", dpo, dpo_seconds), sep="\n\n")


if __name__ == "__main__":
    main()
