"""Claim: jdpo gives a model the tokens that TRL's DPOTrainer gives it. Shown on real conversations, row by row.

    python benchmarks/token_parity.py --data dpo_en_demo.json [--out report.md]

Needs the `parity` extra; about two minutes on two CPU cores. --data is a JSON file in LLaMA-Factory's sharegpt schema
(`conversations[{from, value}]`, `chosen`, `rejected`), or of rows with `prompt`, `chosen`, `rejected` as lists of
messages; rows of plain text are left out, and counted.

For each of four chat templates a tokenizer of its family's kind is trained on the file. jdpo and TRL,
each in a process of its own, then tokenize every row, cut at 1024 tokens and not cut at all. Every difference must
have a named reason that is checked on the row; otherwise, or if no row is equal, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from toy_tokenizers import give_template, train_tokenizer
from trl_parity import as_message, run

from jdpo import __version__
from jdpo.data.schemas.formats import EMPTY_SIDE, Dropped, preference_rows
from jdpo.data.tokens.boundaries import IDENTICAL_SIDES
from jdpo.data.tokens.prompt_end import SHORTER_PREFIX
from jdpo.data.tokens.tokenize import COMPLETION_CUT, IDENTICAL_AFTER_CUT, LONG_PROMPT, KeptPair, tokenize_pairs
from jdpo.data.tokens.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "tests" / "data" / "templates"
VOCAB_SIZE = 4096
MAX_LENGTHS = (1024, 1_000_000)

EQUAL, NEITHER = "the same token for token", "kept by neither: the prompt fills max_length"
BOS_TWICE = "BOS twice in TRL, once in jdpo"
UNEXPLAINED = "UNEXPLAINED"


class Arm(NamedTuple):
    """A chat template, the kind of tokenizer that its family has, and the markers that are tokens there."""

    template: Path
    kind: str
    markers: tuple[str, ...] = ()


ARMS = {
    "ChatML": Arm(ROOT / "jdpo" / "data" / "templates" / "chatml.jinja", "byte", ("<|im_start|>", "<|im_end|>")),
    "Llama 3": Arm(TEMPLATES / "llama3.jinja", "byte_bos", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "Mistral": Arm(TEMPLATES / "mistral_v1.jinja", "pieces"),
    "Zephyr": Arm(TEMPLATES / "zephyr.jinja", "legacy_pieces"),
}

Row = dict[str, Any]


class Tally(NamedTuple):
    """The outcomes of the rows of one template at one max_length: outcome -> rows, and the first unexplained ones."""

    outcomes: Counter[str]
    notes: Counter[str]
    unexplained: list[str]
    num_tokens: int


def main() -> None:
    """Compares jdpo's tokens with TRL's on --data; the exit status is 0 if every difference is explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="conversational preferences, JSON")
    parser.add_argument("--out", type=Path, help="Markdown file for the report")
    arguments = parser.parse_args()
    raw = json.loads(arguments.data.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        tallies = compare_file(raw, Path(scratch))
    packages = ("trl", "transformers", "tokenizers", "torch", "datasets")
    report = render(arguments.data.name, raw, tallies, {name: version(name) for name in packages})
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report, encoding="utf-8")
    raise SystemExit(0 if all(is_explained(tally) for tally in tallies.values()) else 1)


def compare_file(raw: Sequence[Row], scratch: Path) -> dict[tuple[str, int], Tally]:
    """Compares every template at every max_length on the conversational rows of a file."""
    rows = [row for row in raw if is_conversational(row)]
    texts = [message["content"] for row in map(trl_row, rows) for part in row.values() for message in part]
    tallies = {}
    for name, arm in ARMS.items():
        folder = scratch / arm.kind
        save_tokenizer(arm, texts, VOCAB_SIZE, folder)
        for max_length in MAX_LENGTHS:
            theirs = trl_tokens(folder, rows, scratch / "tokens.jsonl", max_length)
            ours = jdpo_tokens(folder, rows, max_length)
            tallies[name, max_length] = tally(rows, theirs, ours, folder, max_length)
            print(f"{name}, max_length {max_length:,}: {dict(tallies[name, max_length].outcomes)}", flush=True)
    return tallies


def is_conversational(row: Row) -> bool:
    """Returns whether TRL takes the row as a conversation, once the names of its columns are TRL's."""
    return "conversations" in row or all(isinstance(row[part], list) for part in ("prompt", "chosen", "rejected"))


def trl_row(row: Row) -> Row:
    """Returns a row of the file in TRL's names, read without jdpo's own reader, which it checks."""
    if "conversations" not in row:
        return {part: row[part] for part in ("prompt", "chosen", "rejected")}
    sides = {side: [as_message(row[side])] for side in ("chosen", "rejected")}
    return {"prompt": [as_message(turn) for turn in row["conversations"]], **sides}


def save_tokenizer(arm: Arm, texts: Sequence[str], vocab_size: int, folder: Path) -> None:
    """Trains the tokenizer of an arm and saves it with its template."""
    hf = train_tokenizer(arm.kind, texts, vocab_size)
    give_template(hf, arm.template, arm.markers)
    hf.save_pretrained(folder)


def trl_tokens(tokenizer: Path, rows: Sequence[Row], scratch: Path, max_length: int) -> dict[int, Row]:
    """Returns the tokens that TRL gives a model for each row, by index; run in a process of its own."""
    path = scratch.with_name("rows.jsonl")
    tools = [{"tools": json.dumps(row["tools"])} if row.get("tools") else {} for row in rows]
    lines = [json.dumps(trl_row(row) | more) + "\n" for row, more in zip(rows, tools, strict=True)]
    path.write_text("".join(lines), encoding="utf-8")
    script = ROOT / "benchmarks" / "trl_tokens.py"
    run(script, "--tokenizer", tokenizer, "--rows", path, "--out", scratch, "--max_length", max_length)
    with scratch.open(encoding="utf-8") as tokens:
        return {record.pop("index"): record for record in map(json.loads, tokens)}


def jdpo_tokens(tokenizer: Path, rows: Sequence[Row], max_length: int) -> list[KeptPair | Dropped]:
    """Returns the tokens that `jdpo dpo` gives a model for each row, through its own reader of schemas."""
    loaded = load_tokenizer(tokenizer, chat_template=None)
    read = [preference_rows(row, f"row {index}") for index, row in enumerate(rows)]
    assert all(len(pairs) == 1 for pairs in read)
    firsts = [pairs[0] for pairs in read]
    results = iter(
        tokenize_pairs([row for row in firsts if not isinstance(row, Dropped)], loaded, max_length=max_length)
    )
    return [row if isinstance(row, Dropped) else next(results) for row in firsts]


def tally(
    rows: Sequence[Row], theirs: dict[int, Row], ours: Sequence[KeptPair | Dropped], tokenizer: Path, max_length: int
) -> Tally:
    """Sorts rows by their outcome."""
    hf = load_tokenizer(tokenizer, chat_template=None).hf
    found = Tally(Counter(), Counter(), [], 0)
    num_tokens = 0
    for index, (row, result) in enumerate(zip(rows, ours, strict=True)):
        outcome = explain(trl_row(row), theirs.get(index), result, hf.bos_token_id, max_length)
        found.outcomes[outcome] += 1
        if outcome == UNEXPLAINED and len(found.unexplained) < 5:
            found.unexplained.append(f"row {index}: TRL {theirs.get(index)}, jdpo {result}")
        if outcome == EQUAL and isinstance(result, KeptPair):
            num_tokens += sum(len(ids) for ids in result.row[:3])
            found.notes.update(result.notes)
    return found._replace(num_tokens=num_tokens)


def explain(row: Row, theirs: Row | None, ours: KeptPair | Dropped, bos: int | None, max_length: int) -> str:
    """Returns the outcome of one row: equal, or the reason for the difference, if the row confirms it."""
    if isinstance(ours, Dropped):
        if theirs is None:
            return NEITHER if ours.reason == LONG_PROMPT else UNEXPLAINED
        words = ["".join(message["content"] or "" for message in row[side]) for side in ("chosen", "rejected")]
        same = theirs["chosen_ids"] == theirs["rejected_ids"]
        borne_out = {EMPTY_SIDE: not all(map(str.strip, words)), IDENTICAL_SIDES: same, IDENTICAL_AFTER_CUT: same}
        return f"dropped by jdpo alone: {ours.reason}" if borne_out.get(ours.reason) else UNEXPLAINED
    prompt, chosen, rejected = (ids.tolist() for ids in ours.row[:3])
    if theirs == {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}:
        return EQUAL
    space = max_length - len(prompt) - 1
    twice = {"prompt_ids": [bos, *prompt], "chosen_ids": chosen[:space], "rejected_ids": rejected[:space]}
    return BOS_TWICE if theirs == twice and prompt[0] == bos else UNEXPLAINED


def is_explained(tally: Tally) -> bool:
    return not tally.outcomes[UNEXPLAINED] and tally.outcomes[EQUAL] > 0


def render(name: str, raw: Sequence[Row], tallies: dict[tuple[str, int], Tally], versions: dict[str, str]) -> str:
    """Returns the comparison as Markdown: a line per template and length, the rows left out, and the machine."""
    num_texts = sum(not is_conversational(row) for row in raw)
    outcomes = list(dict.fromkeys([EQUAL, NEITHER, *(name for tally in tallies.values() for name in tally.outcomes)]))
    notes = (COMPLETION_CUT, SHORTER_PREFIX)
    head = ["template", "tokenizer", "max_length", *outcomes, *(f"of the same: {note}" for note in notes), "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (arm, max_length), tally in tallies.items():
        length = f"{max_length:,}" if max_length < max(MAX_LENGTHS) else "none"
        counts = [tally.outcomes[name] for name in outcomes] + [tally.notes[note] for note in notes]
        cells = [arm, ARMS[arm].kind, length, *(f"{count:,}" for count in counts), f"{tally.num_tokens:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    unexplained = [line for tally in tallies.values() for line in tally.unexplained]
    return "\n".join(
        [
            "# jdpo's tokens against TRL's",
            "",
            f"`python benchmarks/token_parity.py --data {name}`: {len(raw):,} rows, of which {num_texts:,} of plain "
            f"text are left out. Tokenizers of {VOCAB_SIZE:,} entries, trained on the file "
            f"(benchmarks/toy_tokenizers.py). {date.today()}, "
            f"{platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, "
            + ", ".join(f"{package} {number}" for package, number in {"jdpo": __version__, **versions}.items()),
            "",
            *lines,
            "",
            "Every difference has the reason named at it, which was checked on the row."
            if not unexplained
            else "\n".join(unexplained),
            "",
        ]
    )


if __name__ == "__main__":
    main()
