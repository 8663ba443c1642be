"""Renders a report as one page: no script, no network, no other files, and text of the data is never markup."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from jdpo import safe_text
from jdpo.durable import write_durably
from jdpo.inspection.row_statistics import Json
from jdpo.inspection.tree import report_of


def write_page(document: Json, path: Path) -> None:
    """Writes the page of a document of `jdpo.inspection.document`.

    Raises:
      ValueError: the file cannot be written.
    """
    page = page_of(document)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, page)
    except OSError as error:
        raise ValueError(f"cannot write the page to {path}: {error.strerror or error}") from error


def page_of(document: Json) -> str:
    """Returns the page: everything in it is escaped, and its policy lets a browser load nothing and run nothing.

    The policy admits its one style sheet by hash, so a style that came in with the data would not apply either.
    """
    undefined = jinja2.StrictUndefined  # a misspelt name in the template is an error, not an empty text
    environment = jinja2.Environment(
        # autoescape alone would leave invisible and direction characters in.
        autoescape=True,
        undefined=undefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    environment.filters["kind"] = lambda node: type(node).__name__
    # The same tree as in the terminal, so both show the same report.
    report = report_of(document)
    # A browser opens a page at its top, so what is wrong comes first; a terminal shows the end.
    sections = sorted(report.sections, key=lambda section: section.anchor != "findings")
    text = resources.files("jdpo.inspection").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(report=report, sections=sections).strip() + "\n"


def _safe(value: Any) -> Any:
    """Escapes plain text; what the template itself made, such as a macro's markup, stays as it is."""
    return markupsafe.Markup(safe_text.html(value)) if type(value) is str else value
