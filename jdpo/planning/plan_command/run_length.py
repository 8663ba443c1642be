"""The number of steps of a run and the source of its reference's log-probs, as the run itself would decide."""

from __future__ import annotations

import dataclasses

from jdpo.config import OptimizationSettings, ReferenceSettings
from jdpo.data.batching.loader import num_steps_per_epoch
from jdpo.planning.plan_command.row_lengths import RowLengths
from jdpo.planning.planner.planned_run import planned_mode
from jdpo.training.setup.row_order import num_steps_of
from jdpo.training.setup.tasks import Task
from jdpo.training.setup.validation import Mode
from jdpo.words import figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """The number of steps of a run.

    Attributes:
      num_steps: of training; None if it is not known.
      reference: where its log-probs come from.
      reference_steps: steps' worth of rows whose log-probs the reference computes once, before training; 0 without such
        a pass, or where the number of rows is not known.
      why: where the number of steps is from, or what is missing.
      notes: sentences on what else was assumed.
    """

    num_steps: int | None
    reference: Mode
    reference_steps: float
    why: str
    notes: tuple[str, ...] = ()


def run_length(
    settings: OptimizationSettings,
    reference: ReferenceSettings | None,
    task: Task,
    rows: RowLengths,
    *,
    num_rows: int | None,
) -> RunLength:
    """Returns how many steps a run has, and where its reference's log-probs come from.

    Args:
      reference: None for a supervised run.
      num_rows: rows of an epoch; None: those of `rows`, if they are known.

    Raises:
      ValueError: a reference that does not fit the loss.
    """
    per_epoch = num_rows or rows.rows_per_epoch
    steps_per_epoch = per_epoch and num_steps_per_epoch(per_epoch, settings.global_batch_size)
    if settings.max_steps:
        num_steps: int | None = settings.max_steps
        why = "max_steps of the config"
    elif steps_per_epoch and per_epoch:
        num_steps = num_steps_of(settings.num_train_epochs, steps_per_epoch)
        epochs = settings.num_train_epochs
        rows_of_epoch = figure(per_epoch, task.unit.removesuffix("s"))
        why = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'} of {rows_of_epoch}"
    else:
        num_steps = None
        why = "not known: give the number of rows as --num_rows N, or max_steps=N"
    repeats = _repeats_rows(settings, num_steps, steps_per_epoch)
    mode, chosen = planned_mode(reference, task, repeats_rows=repeats)
    notes = []
    if chosen:
        passes = "more than one pass" if repeats else "one pass"
        notes.append(f"reference auto is planned as {mode}: {passes} over the rows, and nothing cached")
    reference_steps = 0.0
    if mode == "cached":
        every_row = num_rows or rows.num_rows
        if every_row:
            reference_steps = every_row / settings.global_batch_size
        else:
            notes.append("the run time leaves out the reference's log-probs, as the number of rows is not known")
    return RunLength(num_steps=num_steps, reference=mode, reference_steps=reference_steps, why=why, notes=tuple(notes))


def _repeats_rows(settings: OptimizationSettings, num_steps: int | None, steps_per_epoch: int | None) -> bool:
    """Returns whether a run passes over its rows more than once; not if that is unknown."""
    if num_steps is not None and steps_per_epoch is not None:
        return num_steps > steps_per_epoch
    return not settings.max_steps and settings.num_train_epochs > 1
