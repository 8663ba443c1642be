"""Claim: `jdpo dpo` trains as TRL's DPOTrainer does, number for number. Shown on real conversations.

    python benchmarks/trl_parity.py --data dpo_en_demo.json [--steps 10] [--out DIR]

Needs the `parity` extra; about four minutes on two CPU cores. --data is a file in LLaMA-Factory's sharegpt schema
(`conversations[{from, value}]`, `chosen`, `rejected`), such as `data/dpo_en_demo.json` of LLaMA-Factory.

One random Llama of 8 M parameters, the same rows in file order, float32, AdamW at a constant 1e-4, no weight
decay, clipping at 1. The rows that the trainers kept must be the same token for token. Then each trains in a
process of its own, and every logged metric of every step is compared with TRL's. The exit status is 1 if a relative
difference exceeds 1e-3, or if the loss did not leave ln 2 by 5 % (then the comparison would show nothing). DIR
keeps both runs and the report.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jdpo import __version__
from jdpo.types import TokenizedPair

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3
MIN_MOVE = 0.05
BATCH, MAX_LENGTH, LEARNING_RATE, BETA = 4, 512, 1e-4, 0.1
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

Step = dict[str, float]


def main() -> None:
    """Runs both trainers on --data and compares them; the exit status is 0 if they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="preferences in the sharegpt schema, JSON")
    parser.add_argument("--steps", type=int, default=10, help=f"optimizer steps of {BATCH} pairs")
    parser.add_argument("--out", type=Path, help="new folder that keeps everything both runs leave")
    arguments = parser.parse_args()
    if arguments.out is not None and arguments.out.exists() and any(arguments.out.iterdir()):
        raise SystemExit(f"--out {arguments.out} is not empty; name a new folder, so that no old trace is compared")
    with tempfile.TemporaryDirectory() as scratch:
        raise SystemExit(0 if run_parity(arguments.data, arguments.out or Path(scratch), arguments.steps) else 1)


def run_parity(data: Path, out: Path, steps: int) -> bool:
    """Returns whether TRL and jdpo agree over `steps` steps on `data`; prints the report and leaves it in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    print(convert_rows(data, out / "rows.jsonl"), flush=True)
    run(ROOT / "benchmarks/random_llama.py", "--rows", out / "rows.jsonl", "--out", out / "model")
    run(
        ROOT / "benchmarks/trl_oracle.py",
        *("--model", out / "model", "--rows", out / "rows.jsonl", "--out", out / "trl"),
        *("--steps", steps, "--batch", BATCH, "--max_length", MAX_LENGTH),
        *("--learning_rate", LEARNING_RATE, "--beta", BETA),
    )
    rows = tokenized_rows(data, out / "model", out / "cache", MAX_LENGTH)
    compare_tokens(out / "trl/tokens.jsonl", rows)
    print(f"{len(rows)} rows kept by both, the same token for token", flush=True)
    run("-m", "jdpo.cli.main", "dpo", *jdpo_arguments(data, out, steps))
    trace = json.loads((out / "trl/trace.json").read_text(encoding="utf-8"))
    steps_run = read_metrics(out / "jdpo/metrics.jsonl")
    differences = compare(trace["steps"], steps_run, beta=BETA)
    report = render(trace, steps_run, differences)
    (out / "report.md").write_text(report, encoding="utf-8")
    print(report)
    return largest(differences) <= TOLERANCE and moved(trace["steps"]) >= MIN_MOVE


def run(*command: object) -> None:
    """Runs Python with these arguments in a separate process, on the CPU."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment)


def convert_rows(data: Path, path: Path) -> str:
    """Writes `data` as TRL's conversational rows; returns a line on the rows left out.

    jdpo drops pairs with an empty side or with identical sides, which teach nothing. TRL trains on them, so they
    are taken from its rows here. Prompts of `max_length` tokens and more are dropped by both trainers themselves.
    """
    kept, left_out = [], 0
    for row in json.loads(data.read_text(encoding="utf-8")):
        chosen, rejected = row["chosen"]["value"], row["rejected"]["value"]
        if not chosen.strip() or not rejected.strip() or chosen == rejected:
            left_out += 1
            continue
        prompt = [as_message(turn) for turn in row["conversations"]]
        sides = {side: [as_message(row[side])] for side in ("chosen", "rejected")}
        kept.append({"prompt": prompt, **sides})
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    return f"{len(kept)} rows for TRL; {left_out} with an empty side or identical sides left out, as jdpo drops them"


def as_message(turn: dict[str, str]) -> dict[str, str]:
    """Converts a sharegpt turn to a chat message."""
    if turn["from"] not in ROLES:
        raise ValueError(f"a turn is from {turn['from']!r}; expected one of {', '.join(ROLES)}")
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def tokenized_rows(data: Path, model: Path, cache: Path, max_length: int) -> list[TokenizedPair]:
    """Returns the rows of `data` as `jdpo dpo` trains on them."""
    from jdpo.config import DatasetConfig
    from jdpo.data.prepared.prepare import prepare_pairs
    from jdpo.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, chat_template=None)
    datasets = [DatasetConfig(path=str(data))]
    prepared = prepare_pairs(datasets, tokenizer, max_length=max_length, cache_dir=cache)
    return [prepared[index] for index in range(len(prepared))]


def compare_tokens(expected: Path, found: Sequence[TokenizedPair]) -> None:
    """Compares the rows of jdpo with those of TRL's tokens.jsonl.

    Raises:
      ValueError: a token differs, or a row is missing; it names the row and the part.
    """
    with expected.open(encoding="utf-8") as lines:
        for number, (line, row) in enumerate(itertools.zip_longest(lines, found)):
            if line is None or row is None:
                raise ValueError(f"one trainer kept {number} rows, {'jdpo' if line is None else 'TRL'} more")
            for part, ids in json.loads(line).items():
                if ids != getattr(row, part).tolist():
                    raise ValueError(f"{part} of {row.origin}: TRL has {ids}, jdpo {getattr(row, part).tolist()}")


def jdpo_arguments(data: Path, out: Path, steps: int) -> list[object]:
    """Returns the settings of `jdpo dpo` that are not defaults."""
    settings = {
        "model_name_or_path": out / "model",
        "datasets": data,
        "output_dir": out / "jdpo",
        "cache_dir": out / "cache",
        "max_length": MAX_LENGTH,
        "global_batch_size": BATCH,
        "max_steps": steps,
        "shuffle": "false",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "compute_dtype": "float32",
        "logging_steps": 1,
    }
    return [part for key, value in settings.items() for part in (f"--{key}", value)]


def read_metrics(path: Path) -> list[Step]:
    """Returns the training steps of a metrics.jsonl."""
    with path.open(encoding="utf-8") as lines:
        return [entry for entry in map(json.loads, lines) if "loss" in entry]


def compare(expected: list[Step], found: list[Step], *, beta: float) -> list[Step]:
    """Returns the difference of each metric at each step, relative to the expected value.

    A reward is beta times the difference of two log-probs, each of which float32 holds to |logps| * 2^-23. A reward
    (or a margin of rewards) near their sum, such as the exact 0 before the first update, has no relative difference
    to speak of; there the difference is taken relative to the smallest reward that float32 gives to within
    TOLERANCE. Accuracies are shares of a batch, and differ absolutely.
    """
    steps = [entry["step"] for entry in expected]
    if [entry["step"] for entry in found] != steps:
        raise ValueError(f"the traces cover different steps: {steps} and {[entry['step'] for entry in found]}")
    differences = []
    for theirs, ours in zip(expected, found, strict=True):
        logps = {side: abs(theirs[f"logps/{side}"]) for side in ("chosen", "rejected")}
        logps["margins"] = logps["chosen"] + logps["rejected"]
        floors = {f"rewards/{name}": 2 * beta * size * 2**-23 / TOLERANCE for name, size in logps.items()}
        floors["rewards/accuracies"] = 1.0
        differences.append(
            {
                name: abs(ours[name] - value) / max(abs(value), floors.get(name, 0.0))
                for name, value in theirs.items()
                if name != "step"
            }
        )
    return differences


def largest(differences: list[Step]) -> float:
    """Returns the largest difference over all metrics and steps; NaN counts as infinite."""
    return max(math.inf if math.isnan(value) else value for step in differences for value in step.values())


def moved(steps: list[Step]) -> float:
    """Returns the distance of the loss from ln 2, where DPO starts, as a share of ln 2."""
    return max(abs(step["loss"] - math.log(2)) for step in steps) / math.log(2)


def render(trace: dict[str, Any], ours: list[Step], differences: list[Step]) -> str:
    """Returns the comparison as Markdown: one line per step, then the verdict."""
    names = list(differences[0])
    lines = ["| step | loss TRL | loss jdpo | " + " | ".join(names) + " |", "|" + "---:|" * (len(names) + 3)]
    for theirs, mine, row in zip(trace["steps"], ours, differences, strict=True):
        cells = " | ".join(f"{row[name]:.1e}" for name in names)
        lines.append(f"| {theirs['step']} | {theirs['loss']:.6f} | {mine['loss']:.6f} | {cells} |")
    versions = trace["versions"] | {"jdpo": __version__} | {name: version(name) for name in ("jax", "flax", "optax")}
    return "\n".join(
        [
            f"Relative difference of `jdpo dpo` from TRL's DPOTrainer, {date.today()}, {platform.machine()} with "
            f"{os.cpu_count()} cores, Python {platform.python_version()}, "
            + ", ".join(f"{name} {number}" for name, number in versions.items()),
            "",
            *lines,
            "",
            f"Largest: {largest(differences):.1e} (allowed {TOLERANCE:.0e}). "
            f"The loss moved {moved(trace['steps']):.0%} away from ln 2 (at least {MIN_MOVE:.0%} asked for).",
            "",
        ]
    )


if __name__ == "__main__":
    main()
