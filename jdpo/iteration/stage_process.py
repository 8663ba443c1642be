"""Runs one stage as a process of its own: the ordinary command, which gets the loop's signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals at which `jdpo dpo` saves a checkpoint and ends."""


def run_stage(words: Sequence[str], *, lock: int) -> int:
    """Runs `jdpo WORDS` and waits for it.

    Args:
      lock: file descriptor that the process keeps open. A lock on that file lasts as long as the process, also if this
        one is killed.

    Returns:
      its exit code, 128 + n if signal n ended it; 128 + n as well if it ended in order after signal n was passed on.
    """
    # -P as in the console script: the current folder is no place for modules.
    command = [sys.executable, "-P", "-m", "jdpo.cli.main", *words]
    passed_on: list[int] = []
    # A group of its own: a terminal sends Ctrl-C to every process of a group, and a second signal ends a run at once.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, pass_fds=[lock])
    previous: dict[int, Any] = {}

    def forward(signum: int, frame: FrameType | None) -> None:
        passed_on.append(signum)
        if process.poll() is None:
            os.kill(process.pid, signum)

    # Python delivers signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
        for signum in map(int, FORWARDED):
            # nohup ignores it for all processes.
            if signal.getsignal(signum) != signal.SIG_IGN:
                previous[signum] = signal.signal(signum, forward)
    try:
        code = process.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if code < 0:
        return 128 - code
    return code or (128 + passed_on[0] if passed_on else 0)
