"""Writes the last line of a process that ends because other processes of its run are gone."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from jdpo.exit_codes import LOST
from jdpo.safe_text import terminal


def end_at_once(text: str, code: int = LOST) -> NoReturn:
    """Writes one line to stderr and ends the process with an exit code, without waiting for its other threads."""
    write_line(text)
    os._exit(code)  # sys.exit would run JAX's shutdown, which waits for the processes that are gone


def write_line(text: str) -> None:
    """Writes an error as one line to stderr, bypassing Python's buffers: another thread may hold their locks."""
    # A progress bar hides the cursor and leaves it in the middle of a line.
    start = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    os.write(2, f"{start}jdpo: error: {terminal(' '.join(text.split()))}\n".encode(errors="replace"))
