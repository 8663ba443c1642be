"""Prints the report in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jdpo.quickstart.experiment import DPO, STANDARD
from jdpo.quickstart.tables import STAGE_TITLES, Group, Table
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich.console import Console
    from rich.text import Text

_STYLES = {STAGE_TITLES[STANDARD]: "yellow", STAGE_TITLES[DPO]: "green"}


def print_report(
    console: Console, tables: Sequence[Table], sentences: Mapping[str, Sequence[str]], files: Sequence[Path]
) -> None:
    """Prints tables, sentences and the paths of the files."""
    for table in tables:
        console.print()
        console.print(_drawn(table))
    for heading, lines in sentences.items():
        console.print(f"\n[bold]{heading}[/bold]")
        console.print(_bullets(lines))
    console.print()
    for path in files:
        console.print(f"  {terminal(path)}", highlight=False, markup=False, emoji=False, soft_wrap=True)


def _drawn(table: Table) -> rich_table.Table:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=table.title,
        caption=table.caption,
        box=box.ROUNDED,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    for number, column in enumerate(table.columns):
        is_number = number >= len(table.columns) - table.numbers
        drawn.add_column(column, justify="right" if is_number else "left", style=_STYLES.get(column, ""))
    for group in table.groups:
        labels = _label(group)
        for row, cells in enumerate(group.lines):
            label = labels[row] if row < len(labels) else Text("")
            # Texts, since brackets in a string would be read as rich's markup.
            ends = row == len(group.lines) - 1 and (len(group.lines) > 1 or bool(group.note))
            drawn.add_row(label, *(Text(terminal(cell)) for cell in cells), end_section=ends)
    return drawn


def _label(group: Group) -> list[Text]:
    """Returns the label for each line: it runs down the first column, a few words per line."""
    from rich.text import Text

    if len(group.lines) == 1:
        label = Text(terminal(group.label))
        return [label.append(f"\n{terminal(group.note)}", "dim") if group.note else label]
    lines = len(group.lines)
    # As narrow as the lines allow, so that the table fits a terminal of 80 columns.
    longest = max(map(len, group.label.split()))
    width = next(width for width in range(longest, 80) if len(textwrap.wrap(group.label, width)) <= lines)
    return [Text(terminal(part)) for part in textwrap.wrap(group.label, width)]


def _bullets(lines: Sequence[str]) -> rich_table.Table:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable.grid(padding=(0, 1))
    for line in lines:
        # Sentences are plain text: brackets in them must not be read as rich's markup.
        grid.add_row(" -", Text(line))
    return grid
