"""Weights & Biases: a run online, or with WANDB_MODE=offline in output_dir/wandb."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jdpo.config import public_text
from jdpo.reports.trackers.tracker import Status, TrackedRun
from jdpo.reports.trackers.wandb_files import newest_step_in


class WandbTracker:
    """Writes a history of metrics, a table of answers at each sampling, and the report as an artifact."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._folder = run.folder
        # wandb uploads the command line, in which addresses of datasets may be signed.
        is_secret = any(public_text(word) != word for word in sys.argv)
        self._run = wandb.init(
            settings=wandb.Settings(x_disable_meta=is_secret),
            dir=str(run.folder),
            id=run.id,
            resume="allow",  # a new id starts a run, a known one continues it
            project=run.project,
            name=run.name,
            group=run.group,
            tags=run.tags or None,  # None: those of WANDB_TAGS
            config=dict(run.config),
            allow_val_change=True,  # settings such as report_to may change when a run is resumed
            reinit="create_new",  # a run that the calling program has open stays its own
        )

    def newest_step(self) -> int:
        # Online it is the server that knows; `step` is the next one.
        return newest_step_in(self._folder, self._run.id) if self._run.offline else self._run.step - 1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        import wandb

        # A table each time, since one that was logged cannot grow.
        table = wandb.Table(columns=["step", "prompt", "answer"], data=[[step, *sample] for sample in samples])
        self._run.log({"samples": table}, step=step)

    def log_report(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self, status: Status) -> None:
        if status == "stopped":
            self._run.mark_preempting()  # with an exit code other than 0 the run's state is then `preempted`
        self._run.finish(exit_code=0 if status == "finished" else 1)
