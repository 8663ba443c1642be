"""TRL's half of the parity checks: trains a model folder with TRL's own DPOTrainer and records every step.

    python benchmarks/trl_oracle.py --model DIR --rows rows.jsonl --out DIR [--steps 10] [--max_length 512]

Needs the `parity` extra. It runs in a process of its own, so that torch and jax never share one. `rows.jsonl`
holds one conversational preference per line (`prompt`, `chosen`, `rejected`, each a list of messages). It writes

    trace.json    versions, settings, how many rows TRL dropped, and TRL's log of each step, unrounded
    tokens.jsonl  what TRL's collator feeds the model, row by row: `prompt_ids`, `chosen_ids`, `rejected_ids`
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEED = 0

METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "num_tokens",
)


def main() -> None:
    """Runs TRL for a few steps on the command line's model and rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of conversational preferences")
    parser.add_argument("--out", type=Path, required=True, help="folder for trace.json and tokens.jsonl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    arguments = parser.parse_args()
    settings = vars(arguments)
    model, rows_path, out = (settings.pop(name) for name in ("model", "rows", "out"))
    with rows_path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(model, rows, scratch, **settings)
        write_tokens(trainer, out / "tokens.jsonl")
        trainer.train()
    trace = {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
        "settings": settings,
        "dropped_rows": len(rows) - len(trainer.train_dataset),
        "steps": [
            {"step": entry["step"], **{name: entry[name] for name in METRICS}}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    (out / "trace.json").write_text(json.dumps(trace, indent=1) + "\n", encoding="utf-8")


def build_trainer(
    model: Path,
    rows: list[dict[str, Any]],
    scratch: str,
    *,
    steps: int,
    batch: int,
    max_length: int,
    learning_rate: float,
    beta: float,
    **changes: Any,
) -> Any:
    """Builds a float32 DPOTrainer on the CPU: rows in file order, AdamW at a constant rate, no decay, clipping at 1.

    Everything else is TRL's default: sigmoid loss, betas (0.9, 0.999), eps 1e-8, `keep_start` truncation, a
    frozen copy of the model as the reference. `changes` overrides fields of DPOConfig.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_length": max_length,
        "beta": beta,
        "optim": "adamw_torch",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    return DPOTrainer(
        model=str(model),
        args=DPOConfig(**settings | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def write_tokens(trainer: Any, path: Path) -> None:
    """Writes the token ids that reach the model, after truncation, one JSON object per row."""
    with path.open("w", encoding="utf-8") as lines:
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            sides = []
            for ids, real, completion in zip(
                batch["input_ids"].tolist(),
                batch["attention_mask"].tolist(),
                batch["completion_mask"].tolist(),
                strict=True,
            ):
                start, end = completion.index(1), sum(real)
                sides.append((ids[:start], ids[start:end]))
            (prompt, chosen), (same_prompt, rejected) = sides
            assert prompt == same_prompt
            record = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            lines.write(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
