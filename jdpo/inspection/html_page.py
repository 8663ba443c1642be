"""The inspection of a run as one page: no script, no network, nothing beside it, and dataset text never as markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jdpo import safe_text
from jdpo.durable import write_durably
from jdpo.inspection import figure_words as words

TEMPLATE = "page.html.jinja"

Json = Mapping[str, Any]


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
    """The page: everything in it is escaped, and its policy lets a browser load nothing and run nothing.

    Its one style sheet is let through by its hash, so that a style that came in with the data would not apply either.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _source_hash
    environment.filters["share"] = words.percent
    environment.globals["words"] = words
    text = resources.files("jdpo.inspection").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(document=document).strip() + "\n"


def _safe(value: Any) -> Any:
    """Escapes plain text; what the template itself has made, such as a macro's markup, is as it is."""
    import markupsafe

    return markupsafe.Markup(safe_text.html(value)) if type(value) is str else value


def _source_hash(text: str) -> str:
    """What a content security policy calls a style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
