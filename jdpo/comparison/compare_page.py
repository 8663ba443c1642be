"""`compare.html`: a comparison as one page. No script, no network, no other files; text of models is never markup."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jdpo.comparison import figure_words
from jdpo.comparison.compare_document import (
    SECTIONS,
    AnswersSideBySide,
    CompareDocument,
    Comparison,
    Figure,
    Unit,
    Values,
)
from jdpo.comparison.compare_plots import IntervalBar, Plot, calibration_plot, interval_bar, reach_of, row_plots
from jdpo.comparison.word_diff import Piece, word_diff
from jdpo.reports.html_files import page_environment, write_html
from jdpo.words import figure as counted

MOST_ANSWERS = 30
"""Prompts whose answers are shown side by side."""


def write_compare_page(document: CompareDocument, path: Path) -> None:
    """Writes the page of a comparison.

    Raises:
      ValueError: the file cannot be written.
    """
    write_html(compare_page(document), path)


def compare_page(document: CompareDocument) -> str:
    """Returns the page. Everything in it is escaped; its policy lets a browser load nothing and run nothing.

    The policy admits its one style sheet by hash, so a style that came in with an answer would not apply either.
    """
    environment = page_environment()
    environment.filters |= {"value": figure_words.value_words, "change": figure_words.change_words}
    views = [_view(document, comparison) for comparison in document.comparisons]
    text = resources.files("jdpo.comparison").joinpath("compare_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(document=document, views=views).strip() + "\n"


class _Row(NamedTuple):
    """A row of the table of figures, in words.

    Attributes:
      label: the figure's title, or the label of a dataset under it.
      is_dataset: True for the rows of one dataset.
      before, after, change: each a value and its interval; empty where there is none.
      bar: the plot of the change.
      finding: better, worse, changed, unclear or unchanged; empty for a figure that is not tested.
      notes: number of prompts and p-value.
    """

    label: str
    is_dataset: bool
    before: tuple[str, str]
    after: tuple[str, str]
    change: tuple[str, str]
    bar: IntervalBar | None
    finding: str
    notes: str


class _Section(NamedTuple):
    title: str
    rows: Sequence[_Row]


class _Answers(NamedTuple):
    shown: AnswersSideBySide
    before: Sequence[Piece]
    after: Sequence[Piece]


class _View(NamedTuple):
    """One comparison, prepared for the template."""

    comparison: Comparison
    sections: Sequence[_Section]
    plots: Sequence[Plot]
    answers: Sequence[_Answers]


def _view(document: CompareDocument, comparison: Comparison) -> _View:
    figures = list(comparison.figures.values())
    sections = []
    for section, title in SECTIONS.items():
        rows = [row for figure in figures if figure.section == section for row in _rows(figure, figures)]
        if rows:
            sections.append(_Section(title, rows))
    calibration = calibration_plot(comparison.calibration)
    plots = ([] if calibration is None else [calibration]) + row_plots(comparison.rows)
    answers = [
        _Answers(shown, *word_diff(shown.before.text, shown.after.text)) for shown in comparison.answers[:MOST_ANSWERS]
    ]
    return _View(comparison, sections, plots, answers)


def _rows(figure: Figure, figures: Sequence[Figure]) -> list[_Row]:
    """Returns the row of a figure over all rows, and one per dataset."""
    # Bars of one unit in one section have one scale, so that their lengths can be compared.
    reach = reach_of(one for one in figures if (one.section, one.unit) == (figure.section, figure.unit))
    unit = figure_words.unit_words(figure)
    title = f"{figure.title}{f' ({unit})' if unit else ''}"
    rows = [_row(figure, figure.all, title, reach, is_dataset=False)]
    return rows + [_row(figure, values, label, reach, is_dataset=True) for label, values in figure.datasets.items()]


def _row(figure: Figure, values: Values, label: str, reach: float, *, is_dataset: bool) -> _Row:
    unit: Unit = figure.unit
    after, before, change = values.after, values.before, values.difference
    nothing = ("", "")
    notes = counted(values.num_prompts, "prompt")
    if values.p_value is not None:
        notes += f", p {'< 0.001' if values.p_value < 0.001 else f'= {values.p_value:.3f}'}"
    return _Row(
        label=label,
        is_dataset=is_dataset,
        before=nothing
        if before is None
        else (figure_words.value_words(before.value, unit), figure_words.interval_words(before, unit)),
        after=(figure_words.value_words(after.value, unit), figure_words.interval_words(after, unit)),
        change=nothing
        if change is None
        else (
            figure_words.change_words(change.value, unit),
            figure_words.interval_words(change, unit, signed=True),
        ),
        bar=None if figure.neutral is None else interval_bar(values, figure.neutral, reach),
        finding=figure.finding_of(values) or "",
        notes=notes,
    )
