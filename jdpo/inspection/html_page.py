"""Renders a report as one page: no script, no network, no other files, and text of the data is never markup."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jdpo.inspection.tree import report_of
from jdpo.reports.data_summary.row_statistics import Json
from jdpo.reports.html_files import page_environment, write_html


def write_page(document: Json, path: Path) -> None:
    """Writes the page of a document of `jdpo.inspection.document`.

    Raises:
      ValueError: the file cannot be written.
    """
    write_html(page_of(document), path)


def page_of(document: Json) -> str:
    """Returns the page: everything in it is escaped, and its policy lets a browser load nothing and run nothing.

    The policy admits its one style sheet by hash, so a style that came in with the data would not apply either.
    """
    environment = page_environment()
    environment.filters["kind"] = lambda node: type(node).__name__
    # The same tree as in the terminal, so both show the same report.
    report = report_of(document)
    # A browser opens a page at its top, so what is wrong comes first; a terminal shows the end.
    sections = sorted(report.sections, key=lambda section: section.anchor != "findings")
    text = resources.files("jdpo.inspection").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(report=report, sections=sections).strip() + "\n"
