"""The summary of a run's rows, which `data.json` in its folder holds; docs/data.md lists the keys of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jdpo._version import __version__
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.reports.data_summary.part_report import part_report, rows_where
from jdpo.reports.data_summary.part_tree import part_section
from jdpo.reports.data_summary.row_statistics import Json, row_facts
from jdpo.safe_text import terminal_lines

DATA_VERSION = 1
"""Raise this when a key of data.json changes its meaning or is removed."""


def run_data(
    train: PreparedData, held_out: PreparedData | None, tokenizer: Tokenizer, *, max_length: int, positions: int | None
) -> Json:
    """Describes the rows of a run as `jdpo inspect` does, except for what needs the files to be read again.

    Args:
      held_out: the evaluation rows, if there are any.
      positions: of the model, if known.
    """

    def part(data: PreparedData) -> Json:
        return part_report(data, row_facts(data, tokenizer, max_length=max_length), [], positions)

    document = {
        "jdpo": __version__,
        "version": DATA_VERSION,
        "train": part(train),
        "eval": None if held_out is None else part(held_out),
        "leakage": None if held_out is None else leakage(train, held_out),
    }
    clean: Json = made_safe(document)
    return clean


def is_run_data(document: Any) -> bool:
    """Returns True if a document is one of `run_data` of this version; anyone may have changed the file."""
    try:
        if document["version"] != DATA_VERSION:
            return False
        for part in (document["train"], *filter(None, [document["eval"]])):
            part_section("", "", part)  # which reads nearly every key
            _ = part["answer_cut"]["share"] + part["answer_cut"]["rows"]
        if (leaked := document["leakage"]) is not None:
            _ = leaked["share"] + leaked["rows"], [(one["eval"], one["train"]) for one in leaked["examples"]]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True


def leakage(train: PreparedData, held_out: PreparedData) -> Json:
    """Counts the evaluation rows whose prompt is trained on, with a few examples."""
    # Keys are hashes of the text in the file, so a prompt is found again whatever the tokenizer made of it.
    leaked = np.isin(held_out.prompt_keys, train.prompt_keys)
    examples = []
    for row in np.flatnonzero(leaked)[:5].tolist():
        twin = int(np.flatnonzero(train.prompt_keys == held_out.prompt_keys[row])[0])
        examples.append({"eval": held_out[row].origin, "train": train[twin].origin})
    return {**rows_where(leaked, held_out), "examples": examples}


def made_safe(value: Any) -> Any:
    """Turns tuples into lists and writes out, in every string, the characters that cannot be seen."""
    if isinstance(value, str):
        return terminal_lines(value)
    if isinstance(value, Mapping):
        return {key: made_safe(inner) for key, inner in value.items()}
    return [made_safe(inner) for inner in value] if isinstance(value, list | tuple) else value
