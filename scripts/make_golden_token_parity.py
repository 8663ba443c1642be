"""Makes tests/golden/token_parity: small tokenizers with chat templates, and what TRL's DPOTrainer makes of rows.

    python scripts/make_golden_token_parity.py [--out tests/golden/token_parity]

Needs the `parity` extra. `rows.jsonl` in that folder is written by hand and stays as it is; it needs no more than
shows where tokenizers of pairs differ: system turns, earlier answers, other scripts, spaces at the ends of answers,
special tokens spelled out, tools, an empty side, equal sides, a prompt and an answer longer than `MAX_LENGTH`. The
tokenizers are trained on it, then TRL tokenizes it with each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from token_parity import ARMS, TEMPLATES, Arm, save_tokenizer, trl_row, trl_tokens  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "token_parity"
MAX_LENGTH = 320
VOCAB_SIZE = 420

GOLDEN_ARMS = {
    **ARMS,
    "Qwen 2.5": Arm(TEMPLATES / "qwen2_5.jinja", "pad_is_eos", ("<|im_start|>", "<|im_end|>")),
    "BOS twice": ARMS["Llama 3"]._replace(template=TEMPLATES / "llama3_bos_twice.jinja"),
}


def main() -> None:
    """Writes tokenizers and tokens next to the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    out: Path = parser.parse_args().out
    with (GOLDEN / "rows.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [message["content"] for row in rows for part in trl_row(row).values() for message in part]
    for name, arm in GOLDEN_ARMS.items():
        folder = folder_of(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        save_tokenizer(arm, texts, VOCAB_SIZE, folder)
        with tempfile.TemporaryDirectory() as scratch:
            tokens = trl_tokens(folder, rows, Path(scratch) / "tokens.jsonl", MAX_LENGTH)
        records = [{"index": index, **record} for index, record in tokens.items()]
        lines_out = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        (folder / "tokens.jsonl").write_text("".join(lines_out), encoding="utf-8")


def folder_of(out: Path, arm: str) -> Path:
    """Returns the folder of an arm's tokenizer and tokens."""
    return out / arm.lower().replace(" ", "_").replace(".", "_")


if __name__ == "__main__":
    main()
