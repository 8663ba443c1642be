"""Settings of the documentation site: `bash scripts/docs.sh` builds it into build/site.

The pages are the Markdown files in docs/, which also read well on their own. The notebook is rendered with the outputs
that are stored in it, and never executed here.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from jdpo._version import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REPOSITORY = (
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository")
)

project = "jdpo"
author = "the jdpo authors"
copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
# The notebook is rendered from its .ipynb, which has the outputs; the .md next to it is what people edit.
exclude_patterns = ["notebooks/*.md"]
nb_execution_mode = "off"
# Tables that a cell writes as Markdown are drawn as those of a page.
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
nitpicky = True

html_theme = "furo"
html_title = f"jdpo {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

_OUTWARD = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>\.\.?/[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def link_files_of_the_repository(app: Sphinx, page: str, source: list[str]) -> None:
    """Replaces links to files outside docs/, which a site has no pages for.

    They lead to the repository where pyproject.toml names one; else a file is offered for download, and a folder is
    named without a link. A link to nothing is a warning, which fails the build.
    """
    here = (DOCS / page).parent

    def replaced(match: re.Match[str]) -> str:
        target = (here / match["path"]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        if not target.is_relative_to(ROOT) or not target.exists():
            logging.getLogger(__name__).warning("link to a file that does not exist: %s", match["path"], location=page)
            return match[0]
        if REPOSITORY is not None:
            place = f"{REPOSITORY}/blob/main/{target.relative_to(ROOT).as_posix()}{match['anchor'] or ''}"
            return f"[{match['text']}]({place})"
        text = match["text"].replace("`", "")
        return f"{{download}}`{text} <{match['path']}>`" if target.is_file() else match["text"]

    source[0] = _OUTWARD.sub(replaced, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_of_the_repository)
