"""Makes tests/golden/trl_dpo: a tiny Llama, preference rows, and what TRL's DPOTrainer logs on them step by step.

    python scripts/make_golden_trl.py [--out tests/golden/trl_dpo]

Needs the `parity` extra (torch, trl). The rows come from a seeded grammar below; the model and TRL's run come
from benchmarks/random_llama.py and benchmarks/trl_oracle.py. The same versions on the same kind of machine give
the same rows, weights and tokens to the byte, and the trace to float32 rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEED = 8
NUM_ROWS = 54
MAX_LENGTH = 160
STEPS, BATCH = 10, 4

PLACES = (
    "the harbour",
    "Košice",
    "a small café",
    "the old mill",
    "São Paulo",
    "the night train",
    "Żabka",
    "the ridge",
)
THINGS = (
    "a lantern",
    "three maps",
    "her violin",
    "an unpaid bill",
    "a crate of plums",
    "the spare key",
    "a 5€ note",
)
DEEDS = ("lost", "painted", "carried home", "forgot", "sold twice", "wrapped in paper", "repaired", "hid")
PEOPLE = ("Mara", "the keeper", "my uncle", "Jürgen", "a stranger", "the twins")
OPENINGS = ("Please tell me:", "I wonder:", "Quick question,", "Hello!", "One more thing.", "Hm...")
SYSTEMS = ("You answer briefly.", "You are a patient guide who never guesses.", "Speak plainly; no lists.")
VAGUE = (
    "I cannot say. ",  # plain: as it is
    "It depends, really. ",
    "Who knows? 🤷 ",
    "No idea!\n",
    "As a model, I would rather not. ",
)

Message = dict[str, str]


def main() -> None:
    """Writes the golden folder, then refuses it if it does not cover its cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "trl_dpo")
    out: Path = parser.parse_args().out
    shutil.rmtree(out / "model", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(random.Random(SEED))
    with (out / "rows.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    run_script(
        "benchmarks/random_llama.py",
        *("--rows", out / "rows.jsonl", "--out", out / "model", "--seed", SEED, "--dtype", "bfloat16"),
        *("--vocab_size", 384, "--hidden_size", 64, "--num_layers", 2, "--num_heads", 4, "--num_kv_heads", 2),
        *("--init_std", 0.2),
    )
    run_script(
        "benchmarks/trl_oracle.py",
        *("--model", out / "model", "--rows", out / "rows.jsonl", "--out", out),
        *("--steps", STEPS, "--batch", BATCH, "--max_length", MAX_LENGTH),
    )
    check_coverage(out)


def run_script(script: str, *arguments: object) -> None:
    """Runs one of this repository's scripts in a separate process."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True)


def make_rows(rng: random.Random) -> list[dict[str, list[Message]]]:
    """Makes conversations of one to three user turns, a third with a system turn; rejected sides evade the question."""
    return [make_row(rng, long_prompt=index % 16 == 7) for index in range(NUM_ROWS)]


def make_row(rng: random.Random, *, long_prompt: bool) -> dict[str, list[Message]]:
    """Makes one row; a long prompt is longer than MAX_LENGTH, so that a trainer must drop the row."""
    prompt: list[Message] = []
    if rng.random() < 1 / 3:
        prompt.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        question, answer = question_and_answer(rng, num_deeds=1)
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question, chosen = question_and_answer(rng, num_deeds=rng.choice((1, 1, 2, 3, 5)))
    if long_prompt:
        question = " ".join(question_and_answer(rng, num_deeds=3)[1] for _ in range(5)) + " " + question
    prompt.append({"role": "user", "content": question})
    rejected = rng.choice(VAGUE) * rng.choice((1, 1, 2, 12))
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def question_and_answer(rng: random.Random, *, num_deeds: int) -> tuple[str, str]:
    """Returns a question about a person in a place, and an answer of `num_deeds` sentences."""
    person, place = rng.choice(PEOPLE), rng.choice(PLACES)
    question = f"{rng.choice(OPENINGS)} what did {person} do near {place}?"
    deeds = [f"{rng.choice(DEEDS)} {rng.choice(THINGS)} on day {rng.randint(1, 30)}" for _ in range(num_deeds)]
    return question, f"Near {place}, {person} " + f".\n{person.capitalize()} then ".join(deeds) + "."


def check_coverage(out: Path) -> None:
    """Fails unless rows were dropped and cut, turns are many, the loss moved, and rewards exceed their rounding.

    A reward is beta times a difference of log-probs that float32 holds to |logps| * 2^-23; one that is not thousands
    of times larger cannot be compared to 1e-3.
    """
    trace = json.loads((out / "trace.json").read_text(encoding="utf-8"))
    tokens = read_jsonl(out / "tokens.jsonl")
    rows = read_jsonl(out / "rows.jsonl")
    lengths = [[len(row["prompt_ids"]) + len(row[side]) for side in ("chosen_ids", "rejected_ids")] for row in tokens]
    moved = max(abs(step["loss"] - math.log(2)) for step in trace["steps"]) / math.log(2)
    covered = {
        "rows dropped": trace["dropped_rows"],
        "chosen sides cut": sum(chosen == MAX_LENGTH for chosen, _ in lengths),
        "rejected sides cut": sum(rejected == MAX_LENGTH for _, rejected in lengths),
        "rows with earlier answers": sum(any(m["role"] == "assistant" for m in row["prompt"]) for row in rows),
        "rows with a system turn": sum(row["prompt"][0]["role"] == "system" for row in rows),
    }
    resolved = min(
        abs(step[f"rewards/{side}"] / (trace["settings"]["beta"] * step[f"logps/{side}"] * 2**-23))
        for step in trace["steps"][1:]
        for side in ("chosen", "rejected")
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{covered}; loss moved {moved:.1%} from ln 2; least reward {resolved:,.0f} x its rounding")
    print(f"{len(tokens)} rows kept, {size:,} bytes")
    enough = moved >= 0.05 and resolved >= 5e3 and len(tokens) >= STEPS * BATCH and size <= 600_000
    if min(covered.values()) == 0 or not enough:
        raise SystemExit("this golden folder does not cover what it is for; see the lines above")


def read_jsonl(path: Path) -> list[Any]:
    """Reads the objects of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
