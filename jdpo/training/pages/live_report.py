"""report.html and data.json of a running run: written on a thread of the first process, and once more at the end.

Nothing here can end a run: a page that cannot be written is noted once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType

from jdpo.durable import write_durably
from jdpo.processes import is_first
from jdpo.reports.data_summary.run_data import run_data
from jdpo.reports.run_page.page_rendering import page_shows, run_page
from jdpo.reports.run_page.page_run import RunStatus
from jdpo.training.logs.facts_of_run import read_data_summary
from jdpo.training.logs.phases import TimingRecord
from jdpo.training.pages.run_report import distinct_names, read_page_run
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.run_setup import Log, Setup

FIRST_AFTER, EVERY = 20.0, 150.0
"""Seconds until the first page, and between two pages."""

MOST_OF_THE_TIME = 0.01
"""The share of the time that pages may take, since a thread that makes one slows the steps down a little."""

ROWS_AT_ONCE = 100_000
"""Up to so many rows are described before training starts, in a third of a second; more are while it trains."""


class LiveReport:
    """Keeps report.html up to date; leaving it writes how the run ended."""

    def __init__(self, setup: Setup, directory: RunDirectory, timing: TimingRecord, log: Log) -> None:
        """
        Args:
          timing: is saved before the last page, which shows it.
          log: takes a line for the user if a page cannot be written.
        """
        self._setup, self._directory, self._timing, self._log = setup, directory, timing, log
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="report", daemon=True)
        self._is_noted = False

    def __enter__(self) -> LiveReport:
        """Describes the rows in data.json, and writes pages from now on."""
        if is_first():
            num_rows = len(self._setup.train_data) + len(self._setup.eval_data or ())
            if num_rows <= ROWS_AT_ONCE:
                self._attempt(self._describe_rows)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_first():
            self._over.set()
            self._thread.join()
            self._attempt(lambda: self._end(error))

    def _end(self, error: BaseException | None) -> None:
        """Notes how the run ended in run.json, and writes its last page."""
        self._directory.end(error)
        record = self._directory.record
        status: RunStatus = record.ended or "finished"
        self._timing.save()
        # Also without a logged line: a run that fails before its first step says why.
        _write_page(self._directory, status, record.end_reason or "")

    def _keep_writing(self) -> None:
        """Runs on the thread."""
        self._attempt(self._describe_rows)
        wait = FIRST_AFTER
        while not self._over.wait(wait):
            if not self._has_lines():
                continue
            began = time.thread_time()
            self._attempt(lambda: _write_page(self._directory, "running"))
            wait = max(EVERY, (time.thread_time() - began) / MOST_OF_THE_TIME)

    def _has_lines(self) -> bool:
        """Returns True once something is logged; before, there is nothing to show."""
        return self._directory.metrics.exists() and self._directory.metrics.stat().st_size > 0

    def _describe_rows(self) -> None:
        setup, path = self._setup, self._directory.path
        train, held_out = setup.train_data, setup.eval_data
        if (found := read_data_summary(path)) is not None:
            parts = {name: found.get(name) for name in ("train", "eval")}
            digests = {name: part.get("digest") if isinstance(part, dict) else None for name, part in parts.items()}
            now = {"train": train.digest, "eval": None if held_out is None else held_out.digest}
            if digests == now:
                return  # they are described already
        positions, max_length = setup.source_config.max_positions, setup.config.max_length
        summary = run_data(train, held_out, setup.tokenizer, max_length=max_length, positions=positions)
        write_durably(path / "data.json", json.dumps(summary, ensure_ascii=False) + "\n")

    def _attempt(self, write: Callable[[], None]) -> None:
        """Does what is of no importance for the training: any failure is noted, and the first one is logged."""
        try:
            write()
        except Exception as error:
            if not self._is_noted:
                self._is_noted = True
                _note(error, self._log)


def renew_last_page(directory: RunDirectory, log: Log) -> None:
    """Writes the page of a finished run again if it does not show the end: the process was killed before it did."""
    if is_first():
        try:
            if not page_shows(directory.report, "finished"):
                _write_page(directory, "finished")
        except Exception as error:  # the run is finished all the same
            _note(error, log)


def _write_page(directory: RunDirectory, status: RunStatus, reason: str = "") -> None:
    (name,) = distinct_names([directory.path])
    write_durably(directory.report, run_page([read_page_run(directory.path, name, status, reason)]))


def _note(error: Exception, log: Log) -> None:
    with contextlib.suppress(Exception):  # the terminal may be what is gone
        log(f"warning: the report of the run cannot be written: {type(error).__name__}: {error}")
