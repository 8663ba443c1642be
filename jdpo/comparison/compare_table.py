"""A comparison in the terminal: a table of figures, then the verdict."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jdpo.comparison.compare_document import SECTIONS, CompareDocument, Comparison, Figure, Values
from jdpo.comparison.figure_words import POINTS, change_words, interval_words, unit_words, value_words
from jdpo.safe_text import terminal, terminal_lines

_STYLES = {"better": "green", "worse": "red", "changed": "cyan", "unclear": "dim", "unchanged": "dim", None: ""}
_VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "changed": "Different",
    "unclear": "Cannot be told from this data",
    "unchanged": "Unchanged",
}
MOST_FACTS = 10


def print_comparison(document: CompareDocument, console: Console) -> None:
    """Prints a comparison."""
    for comparison in document.comparisons:
        console.print()
        console.print(
            Text(f"{terminal(comparison.after.name)} compared with {terminal(document.before.name)}", style="bold")
        )
        console.print(figure_table(comparison.figures.values()))
        _print_facts(comparison, console)
        # Last, where the reader of a terminal looks first.
        _print_verdict(comparison, console)
    for warning in document.warnings:
        console.print(Text(f"note: {terminal_lines(warning)}", style="yellow"))


def _print_verdict(comparison: Comparison, console: Console) -> None:
    for kind, title in _VERDICTS.items():
        if sentences := getattr(comparison.verdict, kind):
            console.print(Text(title, style=_STYLES[kind]))
            for sentence in sentences:
                # Lines that are wrapped are indented like the first.
                console.print(Padding(Text(terminal_lines(sentence)), (0, 0, 0, 2)))


def figure_table(figures: Iterable[Figure]) -> Table:
    """Returns the table of figures, those of a dataset under those of all rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure", overflow="fold")
    # Titles are wrapped before numbers are.
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    figures = list(figures)
    for section, title in SECTIONS.items():
        of_section = [figure for figure in figures if figure.section == section]
        if of_section:
            table.add_row(Text(title, style="bold"))
        for figure in of_section:
            unit = "points" if figure.unit == "points" else unit_words(figure)
            table.add_row(*_cells(figure, figure.all, f"  {figure.title}{f' ({unit})' if unit else ''}"))
            for label, values in figure.datasets.items():
                table.add_row(*_cells(figure, values, f"    {terminal(label)}"))
    return table


def _cells(figure: Figure, values: Values, label: str) -> list[Text]:
    unit, change = figure.unit, values.difference
    style = _STYLES[figure.finding_of(values)]
    return [
        Text(label),
        Text("" if values.before is None else value_words(values.before.value, unit)),
        Text(value_words(values.after.value, unit).removesuffix(POINTS)),
        # Next to shares in percent, differences need no unit.
        Text("" if change is None else change_words(change.value, unit).removesuffix(POINTS), style=style),
        Text(interval_words(change or values.after, unit, signed=change is not None), style=style),
    ]


def _print_facts(comparison: Comparison, console: Console) -> None:
    fell = [fact for fact in comparison.facts if fact.fell]
    for fact in fell[:MOST_FACTS]:
        question, answer = terminal(fact.question), terminal(fact.answer)
        console.print(Text(f"  fell: {question} {answer}: {100 * fact.before:.1f} % to {100 * fact.after:.1f} %"))
    if len(fell) > MOST_FACTS:
        console.print(Text(f"  and {len(fell) - MOST_FACTS:,} more facts in compare.json"))
