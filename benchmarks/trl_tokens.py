"""TRL's half of the token parity: the tokens of its DPOTrainer for conversational rows, row by row.

    python benchmarks/trl_tokens.py --tokenizer DIR --rows rows.jsonl --out tokens.jsonl [--max_length 1024]

Needs the `parity` extra, and runs in a process of its own, so that torch and jax never share one. A DPOTrainer is
built as a user would build it, around a Llama of a few parameters, since it asks for a model; its own dataset and
its own collator then give the ids. Each line holds `index` (of the row among --rows), `prompt_ids`, `chosen_ids`,
`rejected_ids`; rows that TRL drops have no line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from random_llama import random_llama
from trl_oracle import build_trainer, write_tokens


def main() -> None:
    """Tokenizes the command line's rows with TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of conversational preferences")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--max_length", type=int, default=1024)
    arguments = parser.parse_args()
    with arguments.rows.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    write_trl_tokens(arguments.tokenizer, rows, arguments.out, arguments.max_length)


def write_trl_tokens(tokenizer: Path, rows: list[dict[str, Any]], out: Path, max_length: int) -> None:
    """Writes TRL's model inputs for each row; TRL drops rows whose prompt alone fills `max_length`."""
    from transformers import AutoTokenizer

    columns = [column for row in rows for column in row]  # a Dataset takes its columns from its first row
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        hf = AutoTokenizer.from_pretrained(tokenizer)
        hf.save_pretrained(model)
        shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "init_std": 0.05}
        random_llama(hf, argparse.Namespace(**shape, seed=0, dtype="float32")).save_pretrained(model)
        trainer = build_trainer(
            model,
            [{"index": index, **dict.fromkeys(columns), **row} for index, row in enumerate(rows)],
            scratch,
            steps=1,
            batch=1,
            max_length=max_length,
            learning_rate=1e-4,
            beta=0.1,
        )
        write_tokens(trainer, out)
        indices = trainer.train_dataset["index"]
    with out.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    with out.open("w", encoding="utf-8") as lines:
        for index, record in zip(indices, records, strict=True):
            lines.write(json.dumps({"index": index, **record}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
