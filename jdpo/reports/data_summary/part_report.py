"""Reports on training rows or evaluation rows: counts, lengths, cuts, repeats, length bias, margins and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jdpo.data.prepared import token_checks
from jdpo.data.prepared.chunks import RANKED_PAIRS
from jdpo.data.prepared.prepare import DROPPED, KEPT, READ, PreparedData
from jdpo.reports.data_summary.raw_text import TextFacts
from jdpo.reports.data_summary.row_statistics import Json, RowFacts, distribution, nice_edges, repeats
from jdpo.reports.data_summary.visible_text import one_line
from jdpo.reports.share_tests import length_bias

EDGES = {
    "no_bos": token_checks.NO_BOS,
    "bos_twice": token_checks.BOS_TWICE,
    "bos_inside": token_checks.BOS_INSIDE,
    "bos_in_answer": token_checks.STARTS_WITH_BOS,
    "no_end": token_checks.NO_END,
    "end_twice": token_checks.END_TWICE,
    "end_inside": token_checks.END_INSIDE,
}
"""Key of a fault at the beginning or end of a sequence -> the name under which tokenization counts it."""


def part_report(data: PreparedData, facts: RowFacts, texts: Sequence[TextFacts], max_positions: int | None) -> Json:
    """Returns what docs/data.md calls a part.

    Args:
      texts: facts from the raw rows of each dataset; empty if the training rows come from the same files.
      max_positions: positions of the model, if known.
    """
    sequence = data.lengths.astype(np.int64)
    prompt_tokens, sequence_tokens = int(facts.prompt.sum()), int(facts.sequence_tokens.sum())
    any_cut = np.any(list(facts.cut.values()), axis=0)  # [rows]
    found = repeats(data.prompt_keys, list(facts.key.values()))
    edges = {name: (data.counts.get(fault, 0), data.examples.get(fault)) for name, fault in EDGES.items()}
    return {
        "digest": data.digest,
        **_counts(data.counts, data.examples),
        "data_sets": [_dataset(data, number, facts, texts) for number in range(len(data.names))],  # plain: as it is
        "tokens": {
            "prompt": prompt_tokens,
            "sequences": sequence_tokens,
            # Each side's sequence has the prompt.
            "prompt_share": len(facts.length) * prompt_tokens / sequence_tokens,
            "longest": int(np.max(sequence)),
            "longest_row": data[int(np.argmax(sequence))].origin,
        },
        "lengths": _lengths(facts, sequence),
        "answer_cut": rows_where(any_cut, data),
        "cut": {name: rows_where(cut, data) for name, cut in facts.cut.items()},
        "edges": {name: _count(rows, len(data), first) for name, (rows, first) in edges.items()},
        "too_long_for_model": rows_where(sequence > (max_positions or np.inf), data),
        "repeats": {name: rows_where(mask, data) for name, mask in found.items()},
        "length_bias": _length_bias(data, facts, any_cut),
        "margins": _margins(data),
        "text": _marks(texts),
    }


def _counts(counts: Mapping[str, int], examples: Mapping[str, str]) -> Json:
    """Returns how many rows were read, kept, dropped and noted, the most frequent reason first."""
    dropped, notes = [], []
    for name in sorted(counts, key=lambda name: (-counts[name], name)):  # ties by name: the document is reproducible
        one = {"rows": counts[name], "first": examples.get(name)}
        if name.startswith(DROPPED):
            dropped.append({"reason": name.removeprefix(DROPPED), **one})
        elif name not in (READ, KEPT):
            notes.append({"note": name, **one})
    return {
        "rows_read": counts.get(READ, 0),
        "rows_kept": counts.get(KEPT, 0),
        "rows_dropped": sum(one["rows"] for one in dropped),
        "dropped": dropped,
        "notes": notes,
    }


def _dataset(data: PreparedData, number: int, facts: RowFacts, texts: Sequence[TextFacts]) -> Json:
    own = texts[number : number + 1]  # empty if `texts` is
    return {
        "name": data.names[number],
        "schemas": own[0].schemas if own else {},
        **_counts(data.counts_of[number], data.examples_of[number]),
        "tokens": int(facts.sequence_tokens[data.dataset_of == number].sum()),
        "text": _marks(own),
    }


def _count(rows: int, of: int, first: str | None) -> Json:
    return {"rows": rows, "share": rows / of, "first": first}


def rows_where(mask: np.ndarray, data: PreparedData) -> Json:
    """Returns the number and share of the rows in a mask, bool [rows], and the origin of the first."""
    return _count(int(mask.sum()), len(mask), data[int(np.argmax(mask))].origin if mask.any() else None)


def _lengths(facts: RowFacts, sequence: np.ndarray) -> Json:
    # Chosen and rejected share the edges of their bars, so that they can be compared.
    both = np.concatenate(list(facts.length.values()))
    edges = nice_edges(int(both.min()), int(both.max()), whole=True)
    answers = {name: distribution(length, edges) for name, length in facts.length.items()}
    return {"prompt": distribution(facts.prompt), **answers, "sequence": distribution(sequence)}


def _length_bias(data: PreparedData, facts: RowFacts, any_cut: np.ndarray) -> Json | None:
    if len(facts.length) < 2:
        return None
    more = {"pairs_with_a_cut_side": int(any_cut.sum()), "pairs_of_ranked_rows": data.counts.get(RANKED_PAIRS, 0)}
    return length_bias(facts.length["chosen"], facts.length["rejected"]) | more


def _margins(data: PreparedData) -> Json | None:
    present = np.isfinite(data.margins)
    if not present.any():
        return None
    return {
        "rows": int(present.sum()),
        "share": float(present.mean()),
        "negative": rows_where(present & (data.margins < 0), data),
        "zero": rows_where(present & (data.margins == 0), data),
        "distribution": distribution(data.margins),
    }


def _marks(texts: Sequence[TextFacts]) -> Json:
    """Adds up the findings in the texts of several datasets, by kind; the first dataset gives the example."""
    marks: Json = {}
    for kind, mark in (item for text in texts for item in text.marks.items()):
        rows = mark["rows"] + marks.get(kind, {"rows": 0})["rows"]
        # The later dictionary wins, so the first dataset keeps its example.
        marks[kind] = {**mark, "excerpt": one_line(mark["excerpt"]), **marks.get(kind, {}), "rows": rows}
    return dict(sorted(marks.items()))
