"""Writes the last line, and the stacks, of a process that ends because it or another process cannot continue."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jdpo.exit_codes import LOST
from jdpo.safe_text import terminal

_LAST_WORDS_SECONDS = 5.0
"""Time limit for looking up what was saved: the disk may not answer."""


def this_process() -> str:
    """Returns the host and the process id, as the last lines of a run name a process."""
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def end_at_once(text: str, code: int = LOST, *, kind: str = "error") -> NoReturn:
    """Writes one line to stderr and ends the process with an exit code, without waiting for its other threads."""
    write_line(text, kind)
    os._exit(code)  # sys.exit would run JAX's shutdown, which waits for the processes that are gone


def end_saying(text: str, more: Callable[[], str], code: int = LOST, *, kind: str = "error") -> NoReturn:
    """Does the same, with sentences after the text that are looked up now.

    Args:
      more: returns them; it may access a disk that does not answer, so there is a time limit.
    """
    rest = ["Start all processes of this run again with the same command to continue."]

    def ask() -> None:
        rest[:] = [more()]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_SECONDS)
    end_at_once(f"{text}. {rest[0]}", code, kind=kind)


def write_line(text: str, kind: str = "error") -> None:
    """Writes an error as one line to stderr, bypassing Python's buffers: another thread may hold their locks."""
    # A progress bar hides the cursor and leaves it in the middle of a line.
    start = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    # Nobody may be left to read it.
    with contextlib.suppress(OSError):
        os.write(2, f"{start}jdpo: {kind}: {terminal(' '.join(text.split()))}\n".encode(errors="replace"))


def write_stacks(folder: Path | None, name: str, *, parents: bool = False) -> str:
    """Writes the Python stacks of all threads to a file; returns a sentence that names it.

    Args:
      folder: for the file. None, and if it does not exist: the folder for temporary files.
      name: of the file.
      parents: make the folder if its parent exists.
    """
    try:
        if parents and folder is not None and folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
        if folder is None or not folder.is_dir():
            folder = Path(tempfile.mkdtemp(prefix="jdpo-"))  # in a shared /tmp, a fixed name might be another user's
        path = folder / name
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        return f"The stacks of its threads could not be written: {error}."
    return f"The stacks of its threads are in {path}."
