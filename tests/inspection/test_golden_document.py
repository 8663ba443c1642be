"""The document of fixed runs, against tests/golden/inspection.json.

    python tests/inspection/test_golden_document.py        # writes the golden file again

Sentences are left out: their wording may change, while keys, names, numbers and origins may not.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jdpo.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden" / "inspection.json"
SENTENCES = {"summary", "effect", "remedy", "reason", "note", "epoch", "problem", "command_chosen_by", "warnings"}
OF_THE_MACHINE = {"jdpo", "digest", "model_name_or_path"}


def turns(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    parts = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": text}] for name, (role, text) in parts.items()} | columns


ROWS = {
    "chats": [
        turns("river 0", "\x1b[31mstone", "stone light road", score_chosen=1.0, score_rejected=3.0),
        turns("river \u202e1", "stone<|im_end|>\n<|im_start|>system\nlight", "road"),
        turns("Same?", "yes", "no", score_chosen=2.0, score_rejected=1.5),
        turns("Same?", "no", "yes"),
        turns("Same?", "yes", "no"),
        turns("Same?", "yes", "yes"),
        turns("river " * 9, "stone " * 60, "road"),
        *(turns(f"mountain {number}", "stone light " * (1 + number % 3), "road") for number in range(9)),
    ],
    "plain": [{"prompt": f"river {number} ", "chosen": "yes\u200b", "rejected": "no"} for number in range(5)],
    "ranked": [
        {"prompt": f"Hi {number}", "answers": [{"answer": word, "rank": float(rank)} for rank, word in ranks]}
        for number in range(3)
        for ranks in [list(enumerate(("stone", "light light", "road road road"), 1))]
    ],
}
CASES = {
    "pairs": ["datasets={chats}", "eval_datasets={plain}", "--rows=3"],
    "held_out": ["datasets=[{chats}, {plain}]", "eval_fraction=0.3", "micro_batch_size=2", "max_prompt_length=16"],
    "ranked": ["datasets=[{{path: {ranked}, ranked: all}}]", "mesh.data=2", "num_train_epochs=2.5", "seed=7"],
    "supervised": ["datasets={chats}", "--task=sft", "--rows=2"],
}


def document_of(words: list[str], folder: Path) -> Any:
    """Runs `jdpo inspect --json` on a case in a folder with the toy model and the rows."""
    paths = {name: folder / f"{name}.jsonl" for name in ROWS}
    for name, rows in ROWS.items():
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = [f"model_name_or_path={folder / 'toy'}", f"cache_dir={folder / 'cache'}", "max_length=96"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["inspect", *common, "global_batch_size=4", *(word.format(**paths) for word in words), "--json"])
    assert code == 0
    return without_sentences(json.loads(out.getvalue()))


def without_sentences(value: Any) -> Any:
    """Leaves out sentences and what depends on the machine, and rounds numbers to nine digits."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        kept = [without_sentences(one) for one in value if not isinstance(one, str) or " " not in one]
        # Reasons and notes with equal counts are sorted by their wording, which may change.
        counts = bool(kept) and isinstance(kept[0], dict) and set(kept[0]) == {"rows", "first"}
        return sorted(kept, key=str) if counts else kept
    if not isinstance(value, dict):
        return value
    left_out = SENTENCES | OF_THE_MACHINE | ({"first"} if value.get("name") == "dropped" else set())
    return {key: without_sentences(inner) for key, inner in value.items() if key not in left_out}


def write_toy(folder: Path) -> None:
    from jdpo.quickstart.tiny_llama import write_model

    texts = ["river mountain stone light road yes no Same? Hi", "stone light road river mountain"] * 9
    write_model(folder / "toy", texts, hidden_size=64, num_layers=1, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_the_document_of_a_fixed_run_does_not_change(name: str, tmp_path: Path) -> None:
    write_toy(tmp_path)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = document_of(CASES[name], tmp_path)
    assert found == golden
    assert json.dumps(found) == json.dumps(golden), "the order of the keys"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder))
        documents = {name: document_of(words, Path(folder)) for name, words in CASES.items()}
    GOLDEN.write_text(json.dumps(documents, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
