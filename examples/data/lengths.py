"""Prints how long the answers of preference pairs are, in words, as a Markdown table: the table of each README card.

    python examples/data/lengths.py examples/data/word_bias/pairs.jsonl
    python examples/data/lengths.py examples/data/chat_style/pairs.jsonl

Rows are grouped by their column `kind`. `jdpo inspect` counts in tokens of a model instead.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def num_words(answer: Sequence[Row]) -> int:
    """Returns the number of words of an answer; a tool call counts as its JSON text."""
    parts = [str(turn.get("content") or "") for turn in answer]
    parts += [json.dumps(call["function"]) for turn in answer for call in turn.get("tool_calls", ())]
    return sum(len(part.split()) for part in parts)


def table(rows: Sequence[Row]) -> str:
    """Returns the Markdown table: one line per kind, and one for all pairs if there are several kinds."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        lengths = num_words(row["chosen"]), num_words(row["rejected"])
        kinds.setdefault(row.get("kind", "all"), []).append(lengths)
    if len(kinds) > 1:
        kinds["all"] = [lengths for group in kinds.values() for lengths in group]
    lines = ["| kind | pairs | chosen, median words | rejected, median words | chosen is longer | equally long |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for kind, group in kinds.items():
        chosen, rejected = (statistics.median(side) for side in zip(*group, strict=True))
        longer, equal = sum(c > r for c, r in group), sum(c == r for c, r in group)
        shares = [f"{100 * number / len(group):.0f} %" for number in (longer, equal)]
        lines.append(f"| {kind} | {len(group)} | {chosen:g} | {rejected:g} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(paths: Sequence[str]) -> None:
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main(sys.argv[1:])
