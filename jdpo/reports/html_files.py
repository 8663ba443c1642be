"""Pages that a browser opens from a file: no script, no network, no other files, and text of the data is never markup.

A template admits its one style sheet by hash (the filter `sha256`), so a style that came in with a text does not apply.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from jdpo import safe_text
from jdpo.durable import write_durably


def page_environment() -> jinja2.Environment:
    """Returns an environment for templates of pages, which escapes every value.

    Templates can import the macros of `jdpo/reports/data_summary/nodes.html.jinja`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jdpo.reports", "data_summary"),
        # autoescape alone would leave invisible and direction characters in.
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name in the template is an error, not an empty text
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment


def write_html(page: str, path: Path) -> None:
    """Writes a page all or nothing, and makes its folder.

    Raises:
      ValueError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two commands may write one page at the same time.
        write_durably(path, page, writer=f".{os.getpid()}")
    except OSError as error:
        raise ValueError(f"cannot write the page to {path}: {error.strerror or error}") from error


def _safe(value: Any) -> Any:
    """Escapes plain text; what the template itself made, such as a macro's markup, stays as it is."""
    return markupsafe.Markup(safe_text.html(value)) if type(value) is str else value
