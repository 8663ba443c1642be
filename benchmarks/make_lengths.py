"""Makes a table of real lengths from real preferences, from which the speed benchmarks synthesize their rows.

    python benchmarks/make_lengths.py --data dpo_en_demo.json hh_harmless_dev.jsonl.gz \
        --out benchmarks/lengths/long_pairs.csv benchmarks/lengths/hh.csv [--rows 512] [--vocab_size 32000]

One byte-level BPE tokenizer is trained on the words of all files together. Then every file goes the way that its rows
would go in training (recognised, put through the ChatML template, tokenized), but nothing is cut, and the tokens of
prompt, chosen and rejected are counted. Of a file with more rows than --rows, as many are kept, evenly spaced.
The tables hold counts alone: no word of the data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from random_llama import train_tokenizer

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import Dropped, preference_rows
from jdpo.data.sources import read_rows
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.types import Text

UNCUT = 10**6
"""A max_length that no row reaches."""


def main() -> None:
    """Writes the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="preference files")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="one table a file")
    parser.add_argument("--rows", type=int, default=512, help="rows of a table at most")
    parser.add_argument("--vocab_size", type=int, default=32000)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer([text for path in arguments.data for text in texts(path)], arguments.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for data, out in zip(arguments.data, arguments.out, strict=True):
            lengths = measure(data, Path(scratch))
            kept = lengths[evenly_spaced(len(lengths), arguments.rows)]
            np.savetxt(out, kept, fmt="%d", delimiter=",", header="prompt,chosen,rejected", comments="")
            print(f"{out}: {len(kept)} of {len(lengths)} rows, medians {np.median(kept, axis=0).tolist()}")


def texts(path: Path) -> list[str]:
    """Yields every message of a file's preferences, to train the tokenizer."""
    rows = (row for raw, origin in read_rows(DatasetConfig(path=str(path))) for row in preference_rows(raw, origin))
    kept = [row for row in rows if not isinstance(row, Dropped)]
    return [word for row in kept for side in (row.prompt, row.chosen, row.rejected) for word in words(side)]


def words(text: Text) -> list[str]:
    """Returns the contents of messages, or plain text unchanged."""
    return [text] if isinstance(text, str) else [message["content"] or "" for message in text]


def measure(data: Path, tokenizer: Path) -> np.ndarray:
    """Counts tokens of prompt, chosen and rejected, [rows, 3], of every row that jdpo would train on."""
    rows = prepare_pairs(
        [DatasetConfig(path=str(data))],
        load_tokenizer(tokenizer, chat_template=None),
        max_length=UNCUT,
        cache_dir=tokenizer / "cache",
    )
    pairs = (rows[index] for index in range(len(rows)))
    return np.array([(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs])


def evenly_spaced(size: int, most: int) -> Sequence[int]:
    """Returns at most `most` evenly spaced indices below `size`.

    >>> list(evenly_spaced(3, 5)), list(evenly_spaced(6, 3))
    ([0, 1, 2], [0, 2, 4])
    """
    return range(size) if size <= most else [index * size // most for index in range(most)]


if __name__ == "__main__":
    main()
