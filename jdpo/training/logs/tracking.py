"""The trackers of a run, from its start to its end; the first process has them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from types import TracebackType

from jdpo.config import LoggingSettings, to_public_dict
from jdpo.processes import run_jointly
from jdpo.reports.trackers.backlog import lines_until
from jdpo.reports.trackers.delivery import FINISH_SECONDS, Delivery, Line
from jdpo.reports.trackers.sent_steps import SentSteps
from jdpo.reports.trackers.tracker import Status, TrackedRun
from jdpo.reports.trackers.tracker_registry import from_environment, tracker_factory
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.run_setup import Log, Setup


class Tracking:
    """The trackers of a run. When it is left, they are told how the run ended, and get its report."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self.deliveries: list[Delivery] = []

    def put(self, line: Line) -> None:
        """Gives a line to every tracker; returns at once."""
        for delivery in self.deliveries:
            delivery.put(line)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.deliveries:
            return
        status: Status = "failed"
        if not isinstance(error, Exception):  # Ctrl-C and the like are stops
            status = "finished" if kind is None and self._directory.record.finished else "stopped"
        report = self._directory.report
        deadline = time.monotonic() + FINISH_SECONDS  # of all together
        for delivery in self.deliveries:
            delivery.end(status, report if report.is_file() else None, deadline)
        for delivery in self.deliveries:
            delivery.wait(deadline)


def open_trackers(setup: Setup, directory: RunDirectory, newest: int | None, log: Log) -> Tracking:
    """Opens the trackers of a run; those that lack lines of its earlier starts get them. Every process must call this.

    Args:
      newest: step of the checkpoint that the run continues from, or None.

    Raises:
      ValueError: a tracker cannot start.
    """
    tracking = Tracking(directory)

    def open_all() -> None:
        with ExitStack() as opened:
            # If the second one cannot start, the first one has a run that failed.
            opened.enter_context(tracking)
            for name in setup.config.report_to:
                tracking.deliveries.append(_open(name, setup, directory, newest, log))
            opened.pop_all()

    run_jointly(open_all, on_first=True)
    return tracking


def _open(name: str, setup: Setup, directory: RunDirectory, newest: int | None, log: Log) -> Delivery:
    logging: LoggingSettings = setup.config
    factory = tracker_factory(name)
    project = logging.run_project or from_environment(name, "project") or "jdpo"
    sent = SentSteps(directory.path / "trackers" / f"{name}.json", project, new=directory.is_new)
    run = partial(
        TrackedRun,
        name=logging.run_name or from_environment(name, "name") or directory.path.absolute().name,
        project=project,
        group=logging.run_group or from_environment(name, "group"),
        tags=logging.run_tags,
        config=to_public_dict(setup.config),
        folder=directory.path,
    )

    delivery = Delivery(name, sent, log)
    delivery.start(
        lambda id, resumed: factory(run(id=id, resumed=resumed)),
        lines_until(newest, directory.metrics, directory.samples),
    )
    return delivery
