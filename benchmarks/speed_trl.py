"""TRL's arm of the speed benchmark: its own DPOTrainer on the rows of a benchmark, every step timed.

    python benchmarks/speed_trl.py --model DIR --rows rows.jsonl --out DIR --warmup 1 --steps 3 --attention sdpa ...

It runs in a process of its own. DIR gets metrics.jsonl (a line per step, the names of TRL's log and `step_seconds`),
about.json (versions, threads, how long it took to set up, precomputing the reference included) and, with --tokens,
tokens.jsonl. A step is the time between TRL's on_step_begin and on_step_end: forward, backward, clipping and update,
of all its micro-batches, without fetching the first of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl_oracle import build_trainer, write_tokens


class StepTimer(TrainerCallback):
    """Writes a line for every step, as soon as TRL has logged it."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.started = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, "step_seconds": self.seconds, **logs}
        if self.device == "gpu":
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    def _wait(self) -> None:
        if self.device == "gpu":
            torch.cuda.synchronize()


def main() -> None:
    """Trains for a few steps and writes the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of conversational preferences")
    parser.add_argument("--out", type=Path, required=True, help="folder for what it leaves")
    parser.add_argument("--warmup", type=int, required=True, help="steps of the first rows, once")
    parser.add_argument("--steps", type=int, required=True, help="steps of the rows after them")
    parser.add_argument("--passes", type=int, default=1, help="times that these are gone through")
    parser.add_argument("--batch", type=int, required=True, help="pairs per step")
    parser.add_argument("--micro_batch", type=int, help="pairs at once; default: all of a step")
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--attention", required=True, help="attn_implementation of transformers")
    parser.add_argument("--reference", choices=("live", "precomputed"), required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights that are trained")
    parser.add_argument("--liger", action="store_true", help="Liger's layer kernels")
    parser.add_argument("--checkpointing", action="store_true", help="gradient_checkpointing")
    parser.add_argument("--tokens", action="store_true", help="also write tokens.jsonl")
    arguments = parser.parse_args()
    with arguments.rows.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    first, last = (count * arguments.batch for count in (arguments.warmup, arguments.warmup + arguments.steps))
    rows = rows[:first] + rows[first:last] * arguments.passes
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments, rows, scratch)


def run(arguments: argparse.Namespace, rows: list[dict[str, Any]], scratch: str) -> None:
    """Builds the trainer, which precomputes the reference where asked to, and trains."""
    micro_batch = arguments.micro_batch or arguments.batch
    on_gpu = arguments.device == "gpu"
    started = time.perf_counter()
    trainer = build_trainer(
        arguments.model,
        rows,
        scratch,
        steps=len(rows) // arguments.batch,
        batch=micro_batch,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        beta=arguments.beta,
        gradient_accumulation_steps=arguments.batch // micro_batch,
        precompute_ref_log_probs=arguments.reference == "precomputed",
        model_init_kwargs={"attn_implementation": arguments.attention, "dtype": arguments.dtype},
        use_cpu=not on_gpu,
        bf16=on_gpu,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        use_liger_kernel=arguments.liger,
        gradient_checkpointing=arguments.checkpointing,
    )
    about = {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
        "setup_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
    }
    (arguments.out / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    if arguments.tokens:
        write_tokens(trainer, arguments.out / "tokens.jsonl")
    trainer.add_callback(StepTimer(arguments.out / "metrics.jsonl", arguments.device))
    trainer.train()


if __name__ == "__main__":
    main()
