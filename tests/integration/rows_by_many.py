"""One of several processes that prepare the rows of a run, with caches that they share or have for themselves.

python rows_by_many.py MODEL ROWS FOLDER HOSTS

HOSTS is the number of hosts that the processes are taken to be on: those of one host have one node-local cache. The
result is FOLDER/result-INDEX.json: for each case the digest of the rows, how many texts this process has tokenized, and
whether its cache had the rows; or the error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jdpo.config import DPOConfig, load_config
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.processes import barrier, ending_together, join_cluster
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.shared_rows import prepare_rows


class Counting(Tokenizer):
    """A tokenizer that counts the completions that it encodes."""

    num_texts = 0

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        Counting.num_texts += len(texts)
        return super().encode_completions(texts)


class Cases:
    """Prepares rows, once per case."""

    def __init__(self, model: str, rows: str) -> None:
        plain = load_tokenizer(Path(model), chat_template=None)
        self._tokenizer = Counting(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
        self._model, self._rows = model, rows
        self.results: dict[str, Any] = {}

    def prepare(self, name: str, cache: Path, *, rows: str | None = None, stops: bool = False) -> None:
        """Prepares rows with a cache; `stops`: a signal comes to this process while it tokenizes."""
        words = {"datasets": rows or self._rows, "cache_dir": cache, "model_name_or_path": self._model}
        words |= {"output_dir": "unused", "max_length": 64, "dataset_num_proc": 1}
        config = load_config(DPOConfig, None, [f"{key}={value}" for key, value in words.items()])
        Counting.num_texts = 0
        try:
            data, _ = prepare_rows(config, self._tokenizer, lambda line: None, pairs=True, stopped=lambda: stops)
        except BuildStopped:
            self.results[name] = "stopped"
        except ValueError as error:
            self.results[name] = str(error)
        else:
            self.results[name] = [data.digest, Counting.num_texts, data.from_cache]
        barrier(name)  # before the next case changes files


def damage(cache: Path) -> None:
    (path,) = cache.glob("tokenized/*.arrow")
    path.write_bytes(path.read_bytes()[:-100])


def main(model: str, rows: str, folder: Path, hosts: int) -> None:
    index, first = jax.process_index(), jax.process_index() == 0
    cases = Cases(model, rows)
    shared, local = folder / "shared", folder / f"host-{index % hosts}"
    cases.prepare("shared", shared)
    cases.prepare("shared again", shared)
    if first:
        damage(shared)
    barrier("damaged")
    cases.prepare("shared and damaged", shared)
    cases.prepare("local", local)
    if index == hosts - 1:  # the first process of the last host
        damage(local)
    barrier("damaged locally")
    cases.prepare("local and damaged on the last host", local)
    cases.prepare("stopped", folder / "stopped", stops=index == jax.process_count() - 1)
    cases.prepare("bad", folder / "bad", rows=f"{Path(rows).parent}/bad.jsonl")
    cases.prepare("after all", folder / "stopped")
    (folder / f"result-{index}.json").write_text(json.dumps(cases.results))


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
