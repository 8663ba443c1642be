"""Renders a report in the terminal; text of the data is never read as markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from jdpo.inspection.tree import report_of
from jdpo.reports.data_summary.nodes import Data, Finding, Heading, Lines, Node, Paragraph, Table, TokenRow, Words
from jdpo.reports.data_summary.row_statistics import Json

MOST_WIDTH = 110
BAR_WIDTH = 28
STYLES = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
BAR_STYLES = {"chosen": "green", "rejected": "red"}
NAME_STYLES = {"prompt": "dim", "not learnt": "dim", "learnt": "green", **BAR_STYLES}
SPECIAL_STYLE = "bold magenta"
BOUNDARY = "│"
"""Separates tokens if there is no colour to do so."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def print_document(document: Json, console: Console, *, with_ids: bool = False) -> None:
    """Prints the report of a document of `jdpo.inspection.document`; with_ids prints each token's id after it."""
    # Longer lines of text are hard to read.
    console.width = min(console.width, MOST_WIDTH)
    report = report_of(document)
    console.print(_text(report.title, "bold"))
    console.print(_grid(report.facts))
    for section in report.sections:
        console.print()
        console.rule(_text(section.title, "bold"), align="left", characters="─", style="dim")
        for node in section.nodes:
            _print_node(node, console, with_ids)


def _print_node(node: Node, console: Console, with_ids: bool) -> None:
    match node:
        case Heading(title):
            console.print()
            console.print(_text(title, "bold"))
        case Paragraph(words):
            # Text objects, never strings: rich reads [bold] in a string as markup.
            console.print(Padding(_text(words), (0, 0, 0, 2), expand=False))
        case Table():
            console.print(_table(node))
        case Finding(severity, summary, lines):
            rest = [("", (f"{label}: ", *(words if isinstance(words, tuple) else [words]))) for label, words in lines]
            console.print(_grid([(severity, summary), *rest], STYLES[severity]))
        case TokenRow(title, segments):
            console.print()
            console.print(_text(title, "bold"))
            for caption, name, pieces in segments:
                console.print(_text(f"  {caption}", f"italic {NAME_STYLES[name]}"))
                for line in _token_lines(pieces, console, NAME_STYLES[name], with_ids):
                    # Broken into lines already; rich would break within tokens.
                    console.print(line, soft_wrap=True)


def _text(words: Words, style: str = "") -> Text:
    parts = words if isinstance(words, tuple) else (words,)
    return Text("".join(part.text if isinstance(part, Data) else part for part in parts), style)


def _grid(lines: Lines, style: str = "dim") -> rich.table.Table:
    grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=11)
    grid.add_column(overflow="fold")  # never cut: paths and names are to be copied
    for label, words in lines:
        grid.add_row(_text(f"  {label}", style), _text(words))
    return grid


def _table(node: Table) -> rich.table.Table:
    table = rich.table.Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title, kind in node.columns:
        justify: Literal["left", "right"] = "right" if kind == "number" else "left"
        table.add_column(_text(title), justify=justify, no_wrap=kind != "words", overflow="fold")
    width = BAR_WIDTH if len(node.columns) < 5 else BAR_WIDTH // 2 + 4  # two histograms next to each other are narrower
    for row in node.rows:
        cells = zip(node.columns, row, strict=True)
        table.add_row(
            *(_bar(cell, width, name) if isinstance(cell, float) else _text(cell) for (name, _), cell in cells)
        )
    return table


def _bar(share: float, width: int, name: str = "") -> Text:
    """Returns a bar of up to `width` characters; only an empty bar shows nothing.

    >>> [str(_bar(share, 4)) for share in (0.5, 0.001, 0)]
    ['██', '▏', '']
    """
    eighths = max(round(share * width * 8), 1) if share > 0 else 0
    return _text("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip(), BAR_STYLES.get(name, "cyan"))


def _token_lines(pieces: Sequence[Json], console: Console, style: str, with_ids: bool) -> Iterator[Text]:
    """Yields lines of at most the console's width, broken between tokens.

    With colour, every other token is underlined; without, a sign separates tokens.
    """
    coloured, width = console.color_system is not None, max(console.width - 4, 20)
    boundary = "" if coloured else BOUNDARY
    line, used = Text("    "), 0
    for number, piece in enumerate(pieces):
        ids = f"[{','.join(map(str, piece['ids']))}]" if with_ids else ""
        for part_number, part in enumerate(_broken(piece["text"], width)):
            # The piece itself has to fit, with its ids and the sign after it.
            if part_number or used + cell_len(part + ids + boundary) > width:
                yield line
                line, used = Text("    "), 0
            shown = SPECIAL_STYLE if piece["special"] else style + (" underline" if number % 2 else "")
            line.append(part, shown)
            used += cell_len(part)
        line.append(ids, "dim")
        line.append(boundary)
        used += cell_len(ids + boundary)
        if piece["text"].endswith("\n"):  # a line feed of the data ends the line here, too
            yield line
            line, used = Text("    "), 0
    if used:
        yield line


def _broken(text: str, width: int) -> list[str]:
    """Splits a token's text into lines, and a token that is longer than a line into pieces."""
    # Half of the width in characters, since a wide one, such as an emoji, takes two columns.
    lines = text.removesuffix("\n").split("\n")
    return [line[start : start + width // 2] for line in lines for start in range(0, len(line) or 1, width // 2)]
