"""Values that launchers put into shell scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHDIR = "Folder to run in, as the machines of the run see it, for relative paths of the config; by default this one."
CACHE = "Folder for caches, on storage that all machines of the run see; by default ~/.cache, or $XDG_CACHE_HOME."
SETUP = (
    "Shell command that the script runs first, such as 'module load cuda' or 'source venv/bin/activate'; may be "
    "repeated."
)


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


def check_lines(options: Any, *names: str) -> None:
    """Checks that options of a launcher fit on one line of a script, also those that may be repeated.

    Raises:
      ValueError: one holds a line feed or another control character.
    """
    for name in names:
        value = getattr(options, name)
        for each in (value,) if isinstance(value, str) else value:
            one_line(each, f"--{name}")


def check_passed_on(options: Any, *names: str) -> None:
    """Checks options whose values are options of another program, such as --qos=high.

    Raises:
      ValueError: one has no dashes, so that the program would take it for something else, or fits on no line.
    """
    check_lines(options, *names)
    for name in names:
        for each in getattr(options, name):
            if not each.startswith("-"):
                raise ValueError(f"--{name} {each!r}: expected an option with its dashes: --{name}=--NAME=VALUE")


def cache_folder(cache: str, environ: Mapping[str, str]) -> str:
    """Returns the folder for caches.

    Args:
      cache: the option --cache; empty for the user's own, which on clusters is shared, as the home folder is.
    """
    return one_line(cache, "--cache") or environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")


def working_folder(chdir: str) -> Path:
    """Returns the folder that a run starts in.

    Args:
      chdir: the option --chdir; empty for the current folder.

    Raises:
      ValueError: it is a relative path.
    """
    folder = Path(one_line(chdir, "--chdir")) if chdir else Path.cwd()
    if not folder.is_absolute():
        raise ValueError(f"--chdir {chdir}: expected an absolute path")
    return folder


def path_in(folder: Path, path: Path) -> str:
    """Returns the path of a file as seen from the folder that a run starts in.

    >>> path_in(Path("/shared/project"), Path("configs/dpo.yaml"))
    'configs/dpo.yaml'
    >>> path_in(Path("/shared/project"), Path("/home/me/dpo.yaml"))
    '/home/me/dpo.yaml'
    """
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
