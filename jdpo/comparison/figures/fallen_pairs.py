"""The held-out pairs whose chosen answers became least likely, with their texts, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jdpo.comparison.compare_document import FallenPair
from jdpo.comparison.figures.pair_figures import PairRows
from jdpo.config import DatasetConfig
from jdpo.data.schemas.formats import preference_rows
from jdpo.data.sources import open_source
from jdpo.types import CHOSEN, PreferenceRow, Text

MOST_PAIRS = 10


def fallen_pairs(rows: PairRows, paths: Sequence[str]) -> list[FallenPair]:
    """Returns the pairs whose chosen answer lost most log-probability, the largest loss first.

    Args:
      paths: the files of the pairs, in the order of `rows.datasets`; they are read again for the texts.
    """
    change_b = (rows.after - rows.before)[:, CHOSEN]
    # Stable, so that equal losses are in the order of the files.
    most = [int(row) for row in np.argsort(change_b, kind="stable")[:MOST_PAIRS] if change_b[row] < 0]
    texts = {
        (number, origin): row
        for number, path in enumerate(paths)
        for origin, row in _read(path, {rows.origins[row] for row in most if rows.dataset_of[row] == number}).items()
    }
    found = []
    for row in most:
        number, origin = int(rows.dataset_of[row]), rows.origins[row]
        read = texts.get((number, origin))
        found.append(
            FallenPair(
                origin=origin,
                dataset=rows.datasets[number],
                prompt="" if read is None else text_of_turns(read.prompt),
                chosen="" if read is None else text_of_turns(read.chosen),
                num_tokens=int(rows.lengths[row, CHOSEN]),
                before=float(rows.before[row, CHOSEN]),
                after=float(rows.after[row, CHOSEN]),
            )
        )
    return found


def _read(path: str, origins: set[str]) -> dict[str, PreferenceRow]:
    """Reads the rows of the given origins."""
    found: dict[str, PreferenceRow] = {}
    rows = iter(open_source(DatasetConfig(path=path)).rows()) if origins else iter(())
    while len(found) < len(origins) and (one := next(rows, None)) is not None:
        raw, origin = one
        if origin in origins:
            row = next((row for row in preference_rows(raw, origin) if isinstance(row, PreferenceRow)), None)
            # A row that was scored gives a pair, unless the file has changed since.
            if row is None:
                break
            found[origin] = row
    return found


def text_of_turns(text: Text) -> str:
    """Returns a part of a row as text; several messages each after its role."""
    if isinstance(text, str):
        return text
    contents = [(message.get("role", ""), message.get("content")) for message in text]
    if len(contents) == 1 and isinstance(contents[0][1], str):
        return contents[0][1]
    return "\n".join(f"{role}: {content if isinstance(content, str) else ''}" for role, content in contents)
