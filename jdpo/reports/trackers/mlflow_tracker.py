"""MLflow: a run in the store that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.reports.trackers.tracker import Status, TrackedRun

ID_TAG = "jdpo.run_id"
"""The tag by which a resumed run is found: MLflow chooses its ids itself."""
ENDS: Mapping[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MOST_METRICS = 1000
MOST_PARAMS = 100
"""Of one request; a server refuses more."""


class MlflowTracker:
    """Writes metrics, settings as params and as config.yaml, one table of all answers, and the report."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        # Bars of the download that precedes each addition to a table would break the run's own.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # The client, not the functions of `mlflow`, which have one active run per program.
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        known = experiment is not None
        experiment_id = experiment.experiment_id if known else self._client.create_experiment(run.project)
        if run.resumed:
            found = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
            if not found:
                raise LookupError(run.id)
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING", name=run.name)
        else:
            tags = {ID_TAG: run.id, **({} if run.group is None else {"group": run.group})}
            self._id = self._client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
            self._log_params(run.config)
        for tag in run.tags:  # MLflow's tags have values
            self._client.set_tag(self._id, tag, "true")
        # Params cannot change; the file has the settings of the newest start.
        self._client.log_dict(self._id, dict(run.config), "config.yaml")

    def _log_params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)) for key, value in _flat(config)]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def newest_step(self) -> int:
        # Every line has the epoch.
        return max((point.step for point in self._client.get_metric_history(self._id, "epoch")), default=-1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Names of datasets are parts of names of metrics, and MLflow refuses most punctuation in these.
        points = [Metric(re.sub(r"[^\w.\-: /]", "_", name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(points), MOST_METRICS):
            self._client.log_batch(self._id, metrics=points[start : start + MOST_METRICS])

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        prompts, answers = [prompt for prompt, _ in samples], [answer for _, answer in samples]
        table = {"step": [step] * len(samples), "prompt": prompts, "answer": answers}
        self._client.log_table(self._id, table, "samples.json")  # appends to the rows of earlier steps

    def log_report(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._id, ENDS[status])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields keys of groups as `lora.r`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
