"""Writes the badges below the title of README.md, where pyproject.toml names a repository on GitHub; else none.

python scripts/write_badges.py         # after project.urls.Repository was set or changed
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NOTEBOOK = "docs/notebooks/dpo_step_by_step.ipynb"

_BLOCK = re.compile(r"\[!\[.*\n(?:\[!\[.*\n)*\n")


def repository() -> str | None:
    """Returns project.urls.Repository of pyproject.toml, or None."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: str | None = project.get("urls", {}).get("Repository")
    return found


def badges(address: str | None) -> str:
    """Returns the lines of badges for a repository, or nothing.

    Raises:
      ValueError: the address is not one of a repository on GitHub.

    >>> print(badges("https://github.com/owner/jdpo"))
    [![CI](https://github.com/owner/jdpo/actions/workflows/ci.yml/badge.svg)](https://github.com/owner/jdpo/actions/workflows/ci.yml)
    [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/owner/jdpo/blob/main/docs/notebooks/dpo_step_by_step.ipynb)
    <BLANKLINE>
    <BLANKLINE>
    """
    if address is None:
        return ""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if match is None:
        raise ValueError(f"project.urls.Repository is {address!r}; badges need https://github.com/OWNER/NAME")
    runs = f"https://github.com/{match[1]}/actions/workflows/ci.yml"
    colab = "https://colab.research.google.com"
    return (
        f"[![CI]({runs}/badge.svg)]({runs})\n"
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{match[1]}/blob/main/{NOTEBOOK})\n\n"
    )


def with_badges(text: str, address: str | None) -> str:
    """Returns the README with the badges of a repository below its title, in place of those that it has."""
    title, _, rest = text.partition("\n\n")
    return f"{title}\n\n{badges(address)}{_BLOCK.sub('', rest, count=1) if rest.startswith('[![') else rest}"


if __name__ == "__main__":
    README.write_text(with_badges(README.read_text(encoding="utf-8"), repository()), encoding="utf-8")
