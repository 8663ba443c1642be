"""Pages as tests read them: the elements, attributes and text of HTML, and what a browser says of it."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path


class HtmlPage(HTMLParser):
    """A page, parsed as a browser does.

    Attributes:
      elements: each start tag with its attributes, in order.
      text: everything outside of tags and the style sheet.
      words: the same, with a space in front of each element, as between two cells, and no two spaces in a row.
      style: the style sheets.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.style = ""
        self._spaced, self._open = "", ""
        self.feed(page)
        self.words = re.sub(r"\s+", " ", self._spaced)

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    @property
    def attributes(self) -> list[tuple[str, str | None]]:
        return [one for _, attributes in self.elements for one in attributes.items()]

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id" and value]

    @property
    def addresses(self) -> list[str]:
        """What the page links to or loads."""
        return [value for name, value in self.attributes if name in ("href", "src") and value]

    @property
    def policy(self) -> str:
        """What a browser may load for the page."""
        (found,) = [one["content"] for _, one in self.elements if one.get("http-equiv") == "Content-Security-Policy"]
        assert found is not None
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        self._spaced += " "

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.style += data
        else:
            self.text += data
            self._spaced += data


def assert_only_text(page: str) -> HtmlPage:
    """Asserts that a page loads nothing, runs nothing, and has one style sheet, which its policy names.

    Returns:
      the page.
    """
    seen = HtmlPage(page)
    assert not {"script", "img", "iframe", "object", "form", "base"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("style", "srcset")]
    assert seen.tags.count("style") == 1
    assert seen.policy.startswith("default-src 'none'; style-src 'sha256-")
    assert all(address.startswith(("#", "data:,")) for address in seen.addresses)
    return seen


def chromium(page: Path, profile: Path) -> tuple[str, str]:
    """Opens a page in Chromium; returns the document it made of it, and its log."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr
