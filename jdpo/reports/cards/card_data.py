"""The section of a model card on the rows that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jdpo.safe_text import markdown, markdown_code
from jdpo.words import figure, percent

_SIDES = {"prompt": "prompt", "chosen": "chosen answer", "rejected": "rejected answer", "completion": "completion"}
"""Names of lengths in data.json, and what they are called."""

MOST_REASONS = 5


def data_section(data: Mapping[str, Any] | None, rows: str) -> list[str]:
    """Returns the lines of the section.

    Args:
      data: content of data.json; `rows` is shown if it is None, or is not as jdpo writes it.
      rows: summary of the training rows, each dataset followed by indented lines about it.
    """
    try:
        lines = _parts(data or {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # no reason not to export the model
        lines = []
    return ["## Data", "", *(lines or _as_list(rows))]


def _parts(data: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, title in (("train", "Training"), ("eval", "Held-out")):
        if part := data.get(name):
            lines += [*([""] if lines else []), *_part(part, title)]
    return lines


def _as_list(rows: str) -> list[str]:
    """Returns the lines as a list of two levels."""
    lines = [line for line in rows.split("\n") if line.strip()]
    return [f"{'  ' if line.startswith(' ') else ''}- {markdown(line.strip())}" for line in lines]


def _part(part: Mapping[str, Any], title: str) -> Iterator[str]:
    kept, read, tokens = part["rows_kept"], part["rows_read"], part["tokens"]
    of = "" if kept == read else f" of {read:,} read"
    sizes = f"{figure(tokens['sequences'], 'token')}, the longest {tokens['longest']:,}"
    datasets = part["data_sets"]  # plain: as it is
    name = f" from {markdown_code(datasets[0]['name'])}" if len(datasets) == 1 else ""
    yield f"{title}: {figure(kept, 'row')}{of}{name}, {sizes}."
    yield ""
    if len(datasets) > 1:
        yield from ("| dataset | rows | tokens |", "|---|---:|---:|")
        for one in datasets:
            yield f"| {markdown(one['name'])} | {one['rows_kept']:,} | {one['tokens']:,} |"
        yield ""
    yield from ("| length in tokens | median | 5 % to 95 % | longest |", "|---|---:|---:|---:|")
    for name, spread in part["lengths"].items():
        if spread is not None and name in _SIDES:
            middle, low, high = (f"{spread[quantile]:,.0f}" for quantile in ("median", "p5", "p95"))
            yield f"| {_SIDES[name]} | {middle} | {low} to {high} | {spread['maximum']:,.0f} |"
    if remarks := list(_remarks(part)):
        yield ""
        yield from (f"- {remark}" for remark in remarks)


def _remarks(part: Mapping[str, Any]) -> Iterator[str]:
    for one in part["dropped"][:MOST_REASONS]:
        yield f"{figure(one['rows'], 'row')} dropped: {markdown(one['reason'])}"
    if more := part["dropped"][MOST_REASONS:]:
        yield f"{figure(sum(one['rows'] for one in more), 'row')} dropped for other reasons"
    counts = {"cut answers": part["answer_cut"]}
    counts["copies of other rows"] = part["repeats"]["same_row"]
    counts["pairs that contradict another one"] = part["repeats"]["contradictions"]
    for what, count in counts.items():
        if count["rows"]:
            yield f"{count['rows']:,} {what} ({percent(count['share'])})"
    bias = part["length_bias"]
    if bias and bias["share_longer"] is not None:
        yield (
            f"the chosen answer is the longer one in {percent(bias['share_longer'])} of the pairs that differ in "
            f"length (95 % interval {percent(bias['low'])} to {percent(bias['high'])})"
        )
