"""Failures that can end any command: Ctrl-C while it starts, a full disk, too little memory."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than is allowed (ulimit -f)",
}
_DISK_TEXTS = {os.strerror(number): what for number, what in _DISK.items()}
_MEMORY_TEXTS = ("can't start new thread", "failed to map segment from shared object", "Cannot allocate memory")
_RENAME = "`jdpo {}` has no column_map: rename these columns to the names on the left, and fill in what is in <>:"
_COLUMN_ADVICE = {
    "generate": "To name the columns, give this mapping as --column_map '{...}', and fill in what is in <>:",
    **{command: _RENAME.format(command) for command in ("compare", "eval", "iterate")},
}
"""Command without datasets in a config -> its advice on columns that fit no known format."""
INTERRUPTED = "jdpo: interrupted"


def catch_early_interrupts() -> None:
    """Makes Ctrl-C end the process with one line and 130 also while modules are imported.

    During imports, libraries turn a KeyboardInterrupt into an ImportError, or swallow it. Nothing is lost: a command
    that has something to save handles signals itself.
    """
    # Only the main thread may set handlers, and a handler of somebody else stays.
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def catch_early_sigterm() -> None:
    """Makes SIGTERM end the process with 143 also before its command handles signals itself.

    Linux sends the first process of a container no signal that it does not handle.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"jdpo: stopped by SIGTERM before the command began\n")
    # At once: the libraries that are being imported may catch anything that is raised.
    os._exit(128 + signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        # Anywhere below an import statement an exception would be caught or changed by the importing library.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{INTERRUPTED}\n".encode())
            os._exit(128 + signum)
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def leaving_on_signals(advice: str) -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP end the command in order, with the exit code 128 + signal, as Ctrl-C does.

    Args:
      advice: printed then, such as how to continue.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    # Under nohup, SIGHUP is ignored: the command outlives its terminal.
    signals = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, leave) for one in signals}
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"stopped; {advice}", file=sys.stderr, flush=True)
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def explain_input(error: ValueError, command: str) -> str:
    """Returns the message of wrong input, with advice that fits the command."""
    if command not in _COLUMN_ADVICE:
        return str(error)
    from jdpo.data.schemas.refusal import ColumnsError

    return error.with_advice(_COLUMN_ADVICE[command]) if isinstance(error, ColumnsError) else str(error)


def explain_failure(error: BaseException) -> str | None:
    """Returns a message if a disk is full or memory is short, whichever library reports it; None for other errors."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in _DISK and error.filename is not None:
        return f"cannot write {error.filename}: {_DISK[error.errno]}. {_ADVICE}"
    # Libraries wrap errors of the disk in types of their own; then only the text tells.
    if (found := next((what for words, what in _DISK_TEXTS.items() if words in text), None)) is not None:
        if isinstance(error, OSError | ValueError) and getattr(error, "errno", None) is None:
            return text  # jdpo's own message, which names the file
        return f"{found} ({text.splitlines()[0]}). {_ADVICE}"
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY_TEXTS):
        first = f" ({text.splitlines()[0]})" if text else ""
        return (
            f"this process needs more memory or threads than it may use{first}. Raise the limit: `ulimit -v`, "
            "`ulimit -u`, or that of the container"
        )
    return None


_ADVICE = "Free some space and run the same command again: a run continues from its newest intact checkpoint"
