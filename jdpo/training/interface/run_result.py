"""The result of a run, for Python code."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.progress import figures_of
from jdpo.safe_text import terminal
from jdpo.training.interrupt import StopRequest
from jdpo.training.run_dir import REPORT, RunDirectory

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """The end of a run.

    Attributes:
      step: updates made.
      interrupted: True if a signal stopped it, such as Ctrl-C or the interrupt of a notebook. There is a checkpoint of
        `step` then, unless nothing was trained; the same call resumes the run.
      stopped: why a callback stopped it, None if none did; the same call resumes the run.
      exit_code: that of `jdpo dpo`: 0, or 128 + the signal's number.
      output_dir: the run's folder.
      model_dir: the exported model; None if the run was stopped, or exports none.
      report: the page report.html of the run; None if there is none.
      metrics: a pandas.DataFrame with one row for each step with a line in metrics.jsonl: its index is `step`, its
        columns are the metrics of training ("loss", "rewards/margins", ...) and of evaluation ("eval_loss", ...), and
        a value that the step does not have is NaN.
    """

    step: int
    exit_code: int = 0
    interrupted: bool = False
    stopped: str | None = None
    output_dir: Path
    model_dir: Path | None = None

    @property
    def report(self) -> Path | None:
        page = self.output_dir / REPORT
        return page if page.is_file() else None

    @functools.cached_property
    def metrics(self) -> DataFrame:
        # Here, as pandas takes half a second to import.
        import pandas as pd

        by_step: dict[int, dict[str, Any]] = {}
        for line in self._lines:
            # Training and evaluation write a line each after the same step.
            by_step.setdefault(line["step"], {}).update(line)
        columns = dict.fromkeys(("step", *(name for line in self._lines for name in line)))
        return pd.DataFrame(list(by_step.values()), columns=list(columns)).set_index("step")

    @functools.cached_property
    def _lines(self) -> list[dict[str, Any]]:
        path = self.output_dir / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def __repr__(self) -> str:
        how = "interrupted" if self.interrupted else "done"
        if self.stopped is not None:
            how = f"stopped ({terminal(self.stopped)})"
        # After the last step there may be a line of its own for the evaluation.
        figures = figures_of({name: value for line in self._lines[-2:] for name, value in line.items()})
        where = f"model in {self.model_dir}" if self.model_dir is not None else f"run in {self.output_dir}"
        return f"<RunResult: {how} at step {self.step}{f', {figures}' if figures else ''}; {where}>"


def result_of(directory: RunDirectory, step: int, stop: StopRequest | None = None) -> RunResult:
    """Returns the result of a run; `stop` is what stopped it. Every process must call this."""
    if stop is None:
        model = directory.model if directory.model.exists() else None
        return RunResult(step=step, output_dir=directory.path, model_dir=model)
    if stop.signalled():
        return RunResult(step=step, output_dir=directory.path, interrupted=True, exit_code=stop.exit_code)
    return RunResult(step=step, output_dir=directory.path, stopped=stop.reason or "on another process")
