"""Writes a small Llama of random weights, with a tokenizer trained on the texts of JSONL files.

    python examples/data/make_model.py runs/tiny examples/data/word_bias/corpus.jsonl

The recipes of configs/word_bias_*.yaml and configs/chat_style_*.yaml start from such a model, so that they need no
download. It is a Hugging Face folder like any other, and, like a base model of the hub, it has no chat template.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jdpo


def texts(value: Any) -> Iterator[str]:
    """Yields every string inside a row; keys such as `role` are not texts that a model writes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Writes a small Llama of random weights.")
    arguments.add_argument("folder", type=Path, help="where the model is written")
    arguments.add_argument("files", type=Path, nargs="+", help="JSONL files, on which the tokenizer is trained")
    arguments.add_argument("--hidden_size", type=int, default=128, help="model width, a multiple of 64")
    arguments.add_argument("--num_layers", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    lines = [line for path in given.files for line in path.read_text(encoding="utf-8").splitlines()]
    jdpo.random_model(
        given.folder,
        [text for line in lines for text in texts(json.loads(line))],
        hidden_size=given.hidden_size,
        num_layers=given.num_layers,
        max_positions=512,
        chat=False,
        seed=given.seed,
    )
    print(f"wrote {given.folder}")


if __name__ == "__main__":
    main()
