"""Values that are put into shell scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping


def one_line(text: str, name: str) -> str:
    """Returns the text of an option, which has to fit on one line of a script.

    Raises:
      ValueError: it holds a line feed or another control character.

    >>> one_line("--qos=high", "--sbatch")
    '--qos=high'
    """
    if not text.isprintable():
        raise ValueError(f"{name} {text!r}: expected printable text on one line")
    return text


def home_cache(environ: Mapping[str, str]) -> str:
    """Returns the user's folder for caches, which on clusters is on shared storage as the home folder is."""
    return environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
