"""Tunix's arm of the speed benchmark: its own DPOTrainer on the token ids of a benchmark, every step timed.

    python benchmarks/speed_tunix.py --model DIR --ids ids.jsonl --out DIR --steps 4

It runs in a separate process, possibly in another environment. DIR gets metrics.jsonl (a line per step) and about.json.
Tunix's own ways: a live reference in a forward pass of its own, prompts padded on the left and completions on
the right, the head on every position, attention as one dense product (its Llama has no other). Done in its favour:

- It is given token ids, as its TrainingInput allows: its tokenization would put BOS before completions and no end
  after them, and the trainers would learn other rows.
- Its users set one max_prompt_length and one max_response_length for a run. Here every step is padded to its own
  longest prompt and completion, rounded up to a multiple of 64, which is less to compute.
- So it meets a new shape in almost every step, and compiles. A step of a new shape is therefore done twice (the very
  first three times: it compiles twice), and only the last visit is measured. The others update weights as well, so of
  all figures only those of the very first visit can be compared with other trainers'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

MULTIPLE = 64

Row = dict[str, list[int]]


class TimedTrainer(DPOTrainer):
    """Tunix's trainer, but waiting for the end of every step and writing a line for it."""

    def record_to(self, path: Path, visits: list[bool]) -> None:
        """Args:
        path: metrics.jsonl.
        visits: of every step that will be done, whether it counts.
        """
        self.path, self.visits, self.step, self.started = path, iter(visits), 0, 0.0
        self.first: dict[str, float] | None = None

    def _prepare_inputs(self, training_input: Any) -> Any:
        self.started = time.perf_counter()
        return super()._prepare_inputs(training_input)  # includes the reference's forward pass

    def _post_process_train_step(self, aux: Any) -> None:
        super()._post_process_train_step(aux)
        jax.block_until_ready((aux, nnx.state(self.model)))
        seconds = time.perf_counter() - self.started
        line = self._line(aux)
        if self.first is None:  # figures of the first visit are from before any update
            self.first = line
        if not next(self.visits):
            return
        self.step += 1
        line = {"step": self.step, "step_seconds": seconds, **(self.first if self.step == 1 else line)}
        stats = jax.devices()[0].memory_stats()
        if stats:
            line["peak_memory_gib"] = stats["peak_bytes_in_use"] / 2**30
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    def _line(self, aux: Any) -> dict[str, float]:
        logps = {f"logps/{side}": float(aux[f"log_probs/{side}"]) for side in ("chosen", "rejected")}
        return {"loss": float(self._buffered_train_metrics.losses[-1]), **logps}


def main() -> None:
    """Trains for a few steps and writes the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a Llama")
    parser.add_argument("--ids", type=Path, required=True, help="JSONL of prompt_ids, chosen_ids, rejected_ids")
    parser.add_argument("--out", type=Path, required=True, help="folder for what it leaves")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="pairs per step")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with arguments.ids.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    size = arguments.batch
    batches = [padded(rows[step * size : (step + 1) * size]) for step in range(arguments.steps)]
    visits = list(counted_visits(batches))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(arguments.learning_rate, b2=0.999, weight_decay=0.0)
    )
    config = DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=len(visits), beta=arguments.beta)
    policy, reference = load(arguments.model), load(arguments.model)
    trainer = TimedTrainer(model=policy, ref_model=reference, optimizer=optimizer, training_config=config)
    trainer.record_to(arguments.out / "metrics.jsonl", [counts for _, counts in visits])
    about = {"versions": {name: version(name) for name in ("google-tunix", "jax", "flax")}}
    about["versions"]["tunix"] = about["versions"].pop("google-tunix")
    (arguments.out / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    trainer.train([batches[index] for index, _ in visits])


def padded(rows: list[Row]) -> TrainingInput:
    """Returns a padded step: prompts padded on the left, completions on the right.

    ids of prompts 5 6 and 7:  5 6    masks: 1 1
                               0 7           0 1
    """
    prompt = round_up(max(len(row["prompt_ids"]) for row in rows))
    completion = round_up(max(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")))
    arrays: dict[str, np.ndarray] = {}
    for part, width in (("prompt", prompt), ("chosen", completion), ("rejected", completion)):
        ids, mask = np.zeros((2, len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens = row[f"{part}_ids"]
            at = slice(width - len(tokens), width) if part == "prompt" else slice(len(tokens))
            ids[index, at], mask[index, at] = tokens, 1
        arrays |= {f"{part}_ids": ids, f"{part}_mask": mask}
    return TrainingInput(**arrays)


def round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def counted_visits(batches: list[TrainingInput]) -> Iterator[tuple[int, bool]]:
    """Yields (batch, whether it counts) of every step: a new shape twice, the very first three times."""
    seen: set[Any] = set()
    for index, batch in enumerate(batches):
        shape = batch.prompt_ids.shape, batch.chosen_ids.shape
        if shape not in seen:
            yield from [(index, False)] * (1 if seen else 2)
            seen.add(shape)
        yield index, True


def load(folder: Path) -> Any:
    """Loads the weights into Tunix's own Llama with its own reader, in their stored dtype."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw["model_type"] != "llama":
        raise SystemExit(f"{folder} is a {raw['model_type']}; this arm has a Llama")
    config = llama3.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        weight_tying=raw["tie_word_embeddings"],
    )
    return llama3_params.create_model_from_safe_tensors(str(folder), config, dtype=jnp.dtype(raw["dtype"]))


if __name__ == "__main__":
    main()
