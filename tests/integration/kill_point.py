"""Runs `jdpo` and sends itself a real signal, or falls asleep, at a named point of the code.

    python kill_point.py SIGNAL MODULE:QUALNAME before|after NTH -- dpo key=value ...

It comes right before (or after) the NTH call of the function that is made while output_dir has a checkpoint with a
manifest. The function itself is the real one. SLEEP in place of a signal sleeps for good, and SIGTERM+SLEEP does both.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def strike(kinds: str) -> None:
    """Sends this process a signal, or sleeps, or both. A line on stderr tells when."""
    os.write(2, f"struck at {time.time()}\n".encode())
    for kind in kinds.split("+"):
        if kind == "SLEEP":
            time.sleep(10**6)
        else:
            os.kill(os.getpid(), signal.Signals[kind])


def arm(kinds: str, target: str, when: str, nth: int, output_dir: Path, thread: str = "") -> None:
    """Wraps `module:qualname`; with `thread`, counts only calls on threads whose name starts with it."""
    module, _, qualname = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = qualname.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        on_thread = threading.current_thread().name.startswith(thread)
        counts = on_thread and any(output_dir.glob("checkpoints/*/manifest.json"))
        calls += counts
        now = counts and calls == nth
        if now and when == "before":
            strike(kinds)
        result = function(*args, **kwargs)
        if now and when == "after":
            strike(kinds)
        return result

    setattr(owner, name, armed)


def main() -> int:
    kinds, target, when, nth, *rest = sys.argv[1:]
    words = rest[rest.index("--") + 1 :]
    thread = rest[0] if rest[0] != "--" else ""
    (output_dir,) = [Path(word.partition("=")[2]) for word in words if word.startswith("output_dir=")]
    arm(kinds, target, when, int(nth), output_dir, thread)
    from jdpo.cli.main import main as jdpo

    return jdpo(words)


if __name__ == "__main__":
    sys.exit(main())
