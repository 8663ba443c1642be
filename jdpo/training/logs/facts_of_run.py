"""Facts, findings and verdict of a run, from the files in its folder, whether it is in progress or has ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import CONFIGS, OptimizationSettings, PreferenceSettings, load_config
from jdpo.reports.data_summary.run_data import is_run_data
from jdpo.reports.findings import Finding, RunFacts, Status, findings_of, verdict
from jdpo.reports.metrics_file import read_metrics
from jdpo.sharding.axes import AXES, BATCH_AXES
from jdpo.training.run_record import RunRecord
from jdpo.training.sanity_checks import start_loss
from jdpo.training.setup.tasks import loss_of
from jdpo.training.step.optimizer import num_warmup_steps

Lines = Sequence[Mapping[str, Any]]


class Assessment(NamedTuple):
    """The outcome of a run, finished or not.

    Attributes:
      facts: what is known about it, in addition to its metrics.
      findings: what it shows about itself, the most serious first.
      sentences: the verdict.
    """

    facts: RunFacts
    findings: Sequence[Finding]
    sentences: Sequence[str]


def assess(
    run: Path, status: Status | None, *, step: int, lines: Lines, exported_step: int | None = None
) -> Assessment:
    """Returns what came of a run, from the files in its folder.

    Args:
      run, status, step, lines, exported_step: see `read_facts`.

    Raises:
      ValueError: there is no telling, whatever the reason: a run must never fail because of what is told of it.
    """
    try:
        facts = read_facts(run, status, step=step, lines=lines, exported_step=exported_step)
        findings = findings_of(lines, facts)
        return Assessment(facts, findings, verdict(lines, facts, findings))
    except ValueError:
        raise
    # Whatever is in these files, or wrong with what reads them.
    except Exception as error:
        raise ValueError(f"a file in {run} is not as jdpo writes it ({type(error).__name__}: {error})") from error


def read_facts(
    run: Path,
    status: Status | None = None,
    *,
    step: int | None = None,
    lines: Lines | None = None,
    exported_step: int | None = None,
) -> RunFacts:
    """Reads the facts about a run from its folder.

    Args:
      run: the output_dir of a run.
      status: None: finished, stopped or failed, as run.json has it.
      step: updates made; None: as the lines have it.
      lines: of its metrics.jsonl, or the first of them, up to the step that the facts are about; None: all lines.
      exported_step: step of the exported model; None: as run.json has it.

    Raises:
      ValueError: run.json or resolved_config.yaml is missing or damaged.
    """
    try:
        record = RunRecord.read(run / "run.json")
    except OSError as error:
        raise ValueError(f"cannot read {run / 'run.json'}: {error.strerror}") from None
    if record.command not in CONFIGS:
        raise ValueError(f"{run / 'run.json'} was not written by a run of jdpo, or it is damaged")
    config = load_config(CONFIGS[record.command], run / "resolved_config.yaml", [])
    lines = read_metrics(run / "metrics.jsonl") if lines is None else lines
    num_steps = record.num_steps or _num_steps_of(record, lines, config.max_steps, config.num_train_epochs)
    return RunFacts(
        command=record.command,
        status=status or ("finished" if record.finished else record.ended or "stopped"),
        step=max((line["step"] for line in lines), default=0) if step is None else step,
        num_steps=num_steps,
        batch_size=config.global_batch_size,
        batch_parts=_batch_parts(record) if config.packing else None,
        num_rows=record.num_rows,
        num_eval_rows=record.num_eval_rows,
        metric_for_best_model=config.metric_for_best_model,
        load_best_model_at_end=config.load_best_model_at_end,
        exported_step=record.results.get("exported_step") if exported_step is None else exported_step,
        data=read_data_summary(run),
        timing=record.timing,
        late_programs=record.late_programs or 0,
        mirror=record.mirror,
        **_of_optimization(config, num_steps),
        **(_of_loss(config) if isinstance(config, PreferenceSettings) else {}),
    )


def _batch_parts(record: RunRecord) -> int | None:
    """Returns how many parts the mesh of the last fit splits a batch into; None if it is not known."""
    mesh = record.fit.conditions.get("mesh") if record.fit is not None else None
    if not isinstance(mesh, list) or len(mesh) != len(AXES):  # an older version had fewer axes
        return None
    return math.prod(size for axis, size in zip(AXES, mesh, strict=True) if axis in BATCH_AXES)


def _of_optimization(settings: OptimizationSettings, num_steps: int) -> dict[str, Any]:
    return {
        "learning_rate": settings.learning_rate,
        "warmup_steps": num_warmup_steps(settings, num_steps),
        "max_grad_norm": settings.max_grad_norm,
    }


def _of_loss(settings: PreferenceSettings) -> dict[str, Any]:
    loss = loss_of(settings)
    return {
        "losses": loss.terms,
        "has_reference": loss.needs_reference,
        "start_loss": start_loss(loss),
        "beta": settings.beta,
    }


def _num_steps_of(record: RunRecord, lines: Lines, max_steps: int | None, num_train_epochs: float) -> int:
    """Returns the steps of a run of a version that did not write them down."""
    if record.finished:
        return int(record.results["step"])
    if max_steps is not None:
        return max_steps
    last = lines[-1] if lines else {}
    return round(num_train_epochs * last["step"] / last["epoch"]) if last.get("epoch") else 0


def read_data_summary(run: Path) -> dict[str, Any] | None:
    """Returns the content of data.json, or None if the run has none that this version can read."""
    try:
        found: dict[str, Any] = json.loads((run / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if is_run_data(found) else None
