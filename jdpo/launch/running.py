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
    with _signals() as passed_to:
        process = subprocess.Popen(words)
        passed_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """While entered, this process outlives SIGINT and SIGTERM: a command may have to save, and ends in its own time.

    Yields:
      a function that takes the command; from then on SIGTERM, also one that came before, is passed on to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda process: None  # only the main thread may set handlers
        return
    commands: list[subprocess.Popen[bytes]] = []
    waiting: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if not commands:
            waiting.append(signum)
        for command in commands:
            command.send_signal(signum)

    def take(command: subprocess.Popen[bytes]) -> None:
        commands.append(command)
        for signum in waiting:
            command.send_signal(signum)

    before = {
        # Ctrl-C reaches the command by itself, as it is in the same process group.
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield take
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
