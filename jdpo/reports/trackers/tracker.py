"""The interface of trackers, which other packages implement, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "stopped", "failed"]
"""The end of a run: its model is exported; it was stopped and can be resumed; or an error ended it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker records.

    Attributes:
      id: letters and digits; the same at every start of the run, and of no other run.
      resumed: True if an earlier start of the run has used this tracker.
      name: `run_name`, or the name of output_dir.
      project: `run_project`, or "jdpo".
      group: `run_group`.
      tags: `run_tags`.
      config: every key with its value as plain data, without passwords and without queries of web addresses.
      folder: output_dir, for what the tracker writes to disk.
    """

    id: str
    resumed: bool
    name: str
    project: str
    group: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """Receives what a run logs. The entry point is a function, or the class itself, that takes a `TrackedRun`.

    All calls, with that of the entry point, are made by one thread, which belongs to this tracker alone: training never
    waits for them. An exception of the entry point refuses the run before it starts, except that a LookupError (not a
    KeyError) for a resumed run says that the tracker does not have it: it is then called again for a new run, and gets
    every line since step 0. An exception of a method is reported to the user, and does not end the run.
    """

    def newest_step(self) -> int | None:
        """Returns the newest step that is stored, or None if the tracker cannot tell.

        Called once, for a resumed run, of which a killed process may not have stored all; the rest is sent again.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes metrics of a step.

        Steps never decrease, and no metric comes twice for a step, also not after a restart. A step may come in several
        calls: training metrics, answers, `eval_...`.
        """

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Takes prompts and the model's answers after a step."""

    def log_report(self, path: Path) -> None:
        """Takes report.html, once, at the end of a start of the run."""

    def finish(self, status: Status) -> None:
        """Ends this start of the run; everything is stored when it returns."""
