"""A thread that ends this process if it is stuck, or if it was asked to stop and has nothing left to save.

The main thread may be in a compilation, a collective operation or a system call that does not return. Python's signal
handlers run on the main thread and would wait for it, so this thread learns of signals by a file descriptor.
"""

from __future__ import annotations

import contextlib
import faulthandler
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jdpo.exit_codes import STALLED
from jdpo.processes.last_line import end_at_once, end_saying, this_process, write_stacks
from jdpo.processes.process_progress import PROGRESS, State
from jdpo.processes.stalls import point_of
from jdpo.processes.watch import LEAVE_SECONDS
from jdpo.processes.watchdog import Deadlines, Watchdog

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK_SECONDS = 0.5
_ARM_SECONDS, _HELD_SECONDS = 60.0, 300.0
"""Python code cannot run while an extension holds the interpreter's lock; the C library then writes the stacks."""


class Guard:
    """Watches over this process from a thread of its own; see `guarded`."""

    def __init__(self, deadlines: Deadlines | None, folder: Path | None, advice: Callable[[], str]) -> None:
        """
        Args:
          deadlines: None: this process is never considered stuck.
          folder: see `end_for_stall`.
          advice: returns sentences about what was saved and how to continue.
        """
        self._watchdog = Watchdog(PROGRESS, deadlines, time.monotonic())
        self._arms = deadlines is not None
        self._folder, self._advice = folder, advice
        self._latest = self._watchdog.sample(time.monotonic())
        self._index, self._count = 0, 1
        self._stop_since = time.monotonic()
        self._has_seen_signal = False
        self._over = threading.Event()
        self._waking, self._woken = socket.socketpair()
        for end in (self._waking, self._woken):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def joined(self, index: int, count: int) -> None:
        """Tells the guard that this process is one of several: from now on they end together."""
        self._index, self._count = index, count

    def state(self) -> State:
        """Returns what this process is doing, at most half a second old."""
        return self._latest

    def stop(self, signum: int) -> None:
        """Notes that a signal has asked this process, or another one of the run, to stop."""
        if PROGRESS.stop_signal is None:
            PROGRESS.stop_signal = signum

    def leave(self) -> NoReturn:
        """Ends this process with the exit code of the signal that asked it to stop."""
        signum = PROGRESS.stop_signal or signal.SIGTERM
        where = point_of(self._latest) if self._latest.phase != "start" else "while it started"
        text = f"stopped by {signal.Signals(signum).name} {where}; nothing was left to save"
        end_saying(text, self._advice, 128 + signum, kind="note")

    # --- the thread

    def _run(self) -> None:
        armed = 0.0
        poller = select.poll()  # select.select takes no descriptors from 1,024 on
        poller.register(self._woken, select.POLLIN)
        while not self._over.is_set():
            poller.poll(1000 * _TICK_SECONDS)
            with contextlib.suppress(OSError):
                for signum in self._woken.recv(64):
                    if signum in STOP_SIGNALS:
                        self.stop(signum)
            now = time.monotonic()
            if self._arms and now - armed > _ARM_SECONDS:
                armed = now
                faulthandler.dump_traceback_later(_HELD_SECONDS, file=2)
            self._latest = self._watchdog.sample(now)
            self._see(now)

    def _see(self, now: float) -> None:
        if self._count > 1:
            return  # the processes decide together, see `jdpo.processes.watch`
        if not PROGRESS.may_leave:
            self._stop_since = now
        elif now - self._stop_since > LEAVE_SECONDS:
            self.leave()
        if self._latest.left < 0:
            text = f"this process ({this_process()}) is stuck: {point_of(self._latest)} for {self._latest.idle:.0f} s"
            end_for_stall(text, STALLED, self._index, self._folder, self._advice)

    # --- signals, on the main thread

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Once it has begun, a run handles its first signal itself, so this is the second one, or a dry run's first.
        if self._has_seen_signal or PROGRESS.phase != "start":
            end_at_once(f"ended at once by {signal.Signals(signum).name}", 128 + signum, kind="note")
        self._has_seen_signal = True
        self.stop(signum)

    @contextlib.contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        """While entered, the thread hears of signals, and SIGTERM does not end the process by itself."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        handler = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(before)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, the guard watches."""
        with self._waking, self._woken, self._hearing_signals():
            self._thread.start()
            try:
                yield
            finally:
                self._over.set()
                self._thread.join()
                if self._arms:
                    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def guarded(deadlines: Deadlines | None, folder: Path | None, advice: Callable[[], str]) -> Iterator[Guard]:
    """While entered, ends this process if it is stuck, or asked to stop with nothing left to save; see `Guard`."""
    PROGRESS.begin()
    guard = Guard(deadlines, folder, advice)
    try:
        with guard.watching():
            yield guard
    finally:
        PROGRESS.begin()


def end_for_stall(text: str, code: int, index: int, folder: Path | None, advice: Callable[[], str]) -> None:
    """Writes the stacks and one line, and ends the process at once.

    Args:
      index: of this process.
      folder: output_dir; the stacks are written to `stalls` in it, or to a folder for temporary files.
      advice: returns sentences about what was saved and how to continue.
    """
    name = f"process-{index}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    stalls = folder / "stalls" if folder is not None else None
    end_saying(text, lambda: f"{write_stacks(stalls, name, parents=True)} {advice()}", code)
