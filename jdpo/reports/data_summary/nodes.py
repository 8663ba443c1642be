"""The parts of a report: `jdpo.inspection.tree` builds them once, terminal and page each render them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Data:
    """Text that comes from a dataset or a model; the page sets it in monospace and isolates its direction."""

    text: str


Words = str | Data | tuple[str | Data, ...]
Lines = Sequence[tuple[str, Words]]


class Heading(NamedTuple):
    """A heading within a section."""

    title: str


class Paragraph(NamedTuple):
    """A paragraph of text."""

    words: Words


class Table(NamedTuple):
    """A table whose first column names the rows.

    Columns are (title, kind): "words", which wrap, "number", or "bar", whose cells are shares of the longest bar.
    """

    name: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Words | float]]


class TokenRow(NamedTuple):
    """A row of the dataset as segments (title, name, pieces); see `jdpo.inspection.token_display`."""

    title: Words
    segments: Sequence[tuple[str, str, Sequence[dict[str, Any]]]]


class Finding(NamedTuple):
    """A finding with its first row, its effect, and what to do."""

    severity: str
    summary: str
    lines: Lines


Node = Heading | Paragraph | Table | TokenRow | Finding


class Section(NamedTuple):
    """A section; links on the page lead to its anchor."""

    anchor: str
    title: str
    nodes: Sequence[Node]


class Report(NamedTuple):
    """A report: facts about the run, then sections."""

    title: str
    facts: Lines
    sections: Sequence[Section]
