"""Trackio: a local database, or a Space on the Hugging Face Hub with TRACKIO_SPACE_ID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from jdpo.reports.trackers.tracker import Status, TrackedRun


class TrackioTracker:
    """Writes metrics, a table of answers at each sampling, and the report as an artifact."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # Trackio finds a run by its name, which must therefore not be that of another run.
        name = f"{run.name}-{run.id}"
        config = {**run.config, "run_tags": [*run.tags]}
        try:
            self._run = trackio.init(
                run.project,
                name=name,
                group=run.group,
                config=config,
                resume="must" if run.resumed else "never",
                embed=False,
            )
        except ValueError as error:
            if run.resumed and "does not exist" in str(error):
                raise LookupError(name) from error
            raise

    def newest_step(self) -> int | None:
        # Trackio reads it when it resumes a run, but has no public name for it.
        next_step = getattr(self._run, "_next_step", None)
        return None if next_step is None else next_step - 1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)
        self._flush()

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        import trackio

        table = trackio.Table(columns=["step", "prompt", "answer"], data=[[step, *sample] for sample in samples])
        self._run.log({"samples": table}, step=step)
        self._flush()

    def log_report(self, path: Path) -> None:
        self._run.log_artifact(path, name=f"report-{self._run.name}", type="report")

    def _flush(self) -> None:
        """Writes what Trackio's thread would write up to half a second later, and never if the process is killed."""
        # Neither has a public name. A Space gets its lines from the thread, which needs no help.
        flush = getattr(self._run, "_flush_queues_inline", None)
        if flush is not None and getattr(self._run, "_is_local", False):
            with getattr(self._run, "_client_lock", nullcontext()):  # the thread does the same under it
                flush()

    def finish(self, status: Status) -> None:
        import trackio

        # Trackio has no status of a run. An alert is shown next to it, and goes to TRACKIO_WEBHOOK_URL if that is set.
        levels = {"finished": "INFO", "stopped": "WARN", "failed": "ERROR"}
        self._run.alert(f"run {status}", level=trackio.AlertLevel[levels[status]])
        self._run.finish()
