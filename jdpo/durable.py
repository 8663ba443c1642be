"""Small files, written so that a killed process leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp"
"""How the name of a file that is being written ends."""


def write_durably(path: Path, content: str | bytes, *, writer: str = "") -> None:
    """Writes all or nothing, and onto the disk before it returns.

    Args:
      content: bytes, or text that is written as UTF-8.
      writer: tells writers apart that may write the same file at the same time.

    Raises:
      OSError: the folder cannot be written.
    """
    temporary = path.with_name(path.name + writer + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
