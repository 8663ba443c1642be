"""Runs the commands of a launch one after the other."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


def run_commands(commands: Sequence[Sequence[str]], log: Callable[[str], None]) -> int:
    """Runs commands until one fails; their output goes to the terminal.

    Args:
      log: takes a line before each command, and one about a command that fails.

    Returns:
      the exit code of the last command that ran; 128 + n if signal n ended it.
    """
    for words in commands:
        log(f"$ {shlex.join(words)}")
        code = _run(words)
        if code:
            log(f"{words[0]} ended with exit code {code}; nothing further is done")
            return code
    return 0


def _run(words: Sequence[str]) -> int:
    process = subprocess.Popen(words)
    with _passing_signals_to(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While entered, a command ends in its own time when this process is asked to end: it may have to save."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def pass_on(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signum)

    before = {
        # Ctrl-C reaches the command by itself, as it is in the same process group.
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
