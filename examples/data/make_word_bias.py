"""Writes the files of word_bias/: a corpus of conflicting answers, and pairs that prefer the right ones.

    python examples/data/make_word_bias.py              # into examples/data/word_bias
    python examples/data/make_word_bias.py FOLDER

The facts and their frequencies are those of `jdpo quickstart`, for 12 countries instead of 48. The same version of jdpo
writes the same bytes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jdpo.quickstart.corpus import (
    HELD_OUT_PHRASINGS,
    TRAINING_PHRASINGS,
    Split,
    capital_question,
    corpus_rows,
    other_facts,
    preference_rows,
    split_countries,
)
from jdpo.quickstart.geography import Country

Row = dict[str, Any]

COUNTRIES = 12
FREQUENCIES = (6, 3, 1)
SEED = 0


def files(split: Split) -> dict[str, list[Row]]:
    """Returns the rows of every file."""
    # Two pairs per question: against the city that is best known of the wrong ones, and against the third.
    kinds = itertools.cycle(("best-known wrong city", "third city"))
    pairs = [{"kind": kind, **pair} for kind, pair in zip(kinds, preference_rows(split), strict=False)]
    new_phrasings = list(_pairs(split.trained, HELD_OUT_PHRASINGS, "new phrasing"))
    new_countries = list(_pairs(split.held_out, TRAINING_PHRASINGS, "new country"))
    both = list(_pairs(split.held_out, HELD_OUT_PHRASINGS, "new country and phrasing"))
    facts = {fact.question: fact for fact in other_facts(split.countries)}.values()
    return {
        "corpus": corpus_rows(split, FREQUENCIES, SEED),
        "pairs": pairs,
        "held_out_pairs": new_phrasings + new_countries + both,
        "facts": [{"prompt": _user(fact.question), "answer": fact.answer} for fact in facts],
        "prompts": [
            {"prompt": _user(capital_question(country, phrasing))}
            for country in split.countries
            for phrasing in (TRAINING_PHRASINGS[0], HELD_OUT_PHRASINGS[0])
        ],
    }


def _pairs(countries: Sequence[Country], phrasings: Sequence[str], kind: str) -> Iterable[Row]:
    """Yields pairs of the right city and the best-known wrong one."""
    for country in countries:
        for phrasing in phrasings:
            yield {
                "kind": kind,
                "prompt": _user(capital_question(country, phrasing)),
                "chosen": [{"role": "assistant", "content": country.capital}],
                "rejected": [{"role": "assistant", "content": country.wrong}],
            }


def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def main(words: Sequence[str]) -> None:
    folder = Path(words[0]) if words else Path(__file__).parent / "word_bias"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files(split_countries(COUNTRIES)).items():
        text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl  {len(rows)} rows  {len(text.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
