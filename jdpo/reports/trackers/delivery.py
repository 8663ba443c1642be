"""Hands the lines of a run to a tracker on a thread: a slow tracker delays nothing, a broken one ends nothing."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import public_text
from jdpo.reports.trackers.sent_steps import SentSteps
from jdpo.reports.trackers.tracker import Status, Tracker
from jdpo.safe_text import terminal
from jdpo.words import figure

MOST_WAITING = 1000
"""Lines that wait for a tracker; further ones are dropped, and counted."""
START_SECONDS = 120
FINISH_SECONDS = 60
SAMPLES = "samples"
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class Line(NamedTuple):
    """Metrics of a step, or prompts and answers."""

    step: int
    metrics: Mapping[str, float] = {}
    samples: Sequence[tuple[str, str]] = ()


class _End(NamedTuple):
    status: Status
    report: Path | None


class Delivery:
    """One tracker, and the thread that makes all calls of it."""

    def __init__(self, name: str, sent: SentSteps, log: Callable[[str], None]) -> None:
        """
        Args:
          name: of the tracker, for messages.
          sent: what the tracker has; used by the thread alone once this has started.
          log: takes lines for the user.
        """
        self._name, self._sent, self._log = name, sent, log
        self._waiting: queue.Queue[Line | _End] = queue.Queue(MOST_WAITING)
        self._started: queue.Queue[BaseException | None] = queue.Queue(1)
        self._failed = self._dropped = 0
        self._first_error = ""
        self._thread: threading.Thread | None = None

    def start(self, make: Callable[[str, bool], Tracker], backlog: Iterable[Line]) -> None:
        """Opens the tracker, and waits until it is open.

        Args:
          make: called on the thread, with the id of the run and whether an earlier start has used the tracker.
          backlog: lines of earlier starts of the run; those that the tracker does not have are sent.

        Raises:
          ValueError: the tracker cannot be opened, or not in START_SECONDS.
        """
        # A daemon, since a thread that hangs in a tracker would keep the process from exiting.
        self._thread = threading.Thread(
            target=self._run, args=(make, backlog), name=f"tracker-{self._name}", daemon=True
        )
        self._thread.start()
        try:
            error = self._started.get(timeout=START_SECONDS)
        except queue.Empty:
            raise ValueError(
                f"report_to {self._name}: it did not start in {START_SECONDS} seconds. Check that its server answers, "
                "or leave it out of report_to"
            ) from None
        if error is not None:
            raise ValueError(
                f"report_to {self._name} cannot start: {_shown(error)}. Correct that, or leave it out of report_to"
            ) from error

    def put(self, line: Line) -> None:
        """Takes a line for the tracker; returns at once."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def end(self, status: Status, report: Path | None, deadline: float) -> None:
        """Asks the tracker to finish once it has what waits; returns at once, unless too many lines wait."""
        with contextlib.suppress(queue.Full):  # `wait` tells
            self._waiting.put(_End(status, report), timeout=max(0.0, deadline - time.monotonic()))

    def wait(self, deadline: float) -> None:
        """Waits until the tracker has finished, or until `deadline`, and tells what it did not get."""
        assert self._thread is not None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        lost = []
        if self._failed:
            lost.append(f"{figure(self._failed, 'call')} failed (the first: {self._first_error})")
        if self._dropped:
            lost.append(f"{figure(self._dropped, 'line')} came faster than it could take them, and were dropped")
        if self._thread.is_alive():
            lost.append(f"it did not finish in {FINISH_SECONDS} seconds, and is left alone")
        if lost:
            self._log(f"warning: tracker {self._name} is incomplete: {'; '.join(lost)}. metrics.jsonl has every line")

    def _open(self, make: Callable[[str, bool], Tracker]) -> Tracker:
        sent = self._sent
        try:
            tracker = make(sent.id, sent.resumed)
        except LookupError as error:
            # The tracker does not have the run. A KeyError is another thing, a mistake in the tracker.
            if type(error) is not LookupError or not sent.resumed:
                raise
            self._log(f"note: tracker {self._name} does not have this run: it gets all of it as a new run")
            sent.start_new()
            return make(sent.id, False)
        if sent.resumed and (newest_step := tracker.newest_step()) is not None:
            sent.correct(newest_step)
        return tracker

    def _run(self, make: Callable[[str, bool], Tracker], backlog: Iterable[Line]) -> None:
        try:
            tracker = self._open(make)
        except BaseException as error:  # SystemExit, too: it is raised where the run waits
            self._started.put(error)
            return
        self._started.put(None)
        self._try("with the lines of earlier starts", self._send_all, tracker, backlog)
        while isinstance(item := self._waiting.get(), Line):
            self._try(f"at step {item.step}", self._send, tracker, item)
        report, status = item.report, item.status
        # Not `tracker.finish` as an argument: a tracker that lacks a method is told of, too.
        if report is not None:
            self._try("with the report", lambda: tracker.log_report(report))
        self._try("at its end", lambda: tracker.finish(status))

    def _send_all(self, tracker: Tracker, lines: Iterable[Line]) -> None:
        for line in lines:
            self._try(f"at step {line.step}", self._send, tracker, line)

    def _send(self, tracker: Tracker, line: Line) -> None:
        names = [*line.metrics, *([SAMPLES] if line.samples else [])]
        missing = self._sent.missing(line.step, names)
        if not missing:
            return
        with self._sent.sending(line.step, missing):
            if metrics := {name: value for name, value in line.metrics.items() if name in missing}:
                tracker.log(line.step, metrics)
            if SAMPLES in missing:
                tracker.log_samples(line.step, line.samples)

    def _try(self, where: str, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except (Exception, SystemExit) as error:
            self._failed += 1
            if self._failed == 1:
                self._first_error = f"{where}, {_shown(error)}"
                self._log(
                    f"warning: tracker {self._name} failed {where}: {_shown(error)}. The run continues; further "
                    "failures of it are counted"
                )


def _shown(error: BaseException) -> str:
    """Returns an error as text, without passwords: those of addresses, and values of the environment."""
    text = public_text(f"{type(error).__name__}: {error}")
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return terminal(text).rstrip(".")
