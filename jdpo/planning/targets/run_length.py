"""How many steps a run has, and where its reference's log-probs come from, as the run itself would decide."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jdpo.config import DPOConfig, ReferenceSettings, TrainConfig
from jdpo.data.batching.loader import num_steps_per_epoch
from jdpo.planning.targets.row_lengths import RowLengths
from jdpo.training.setup.row_order import num_steps_of
from jdpo.training.setup.tasks import task_for
from jdpo.training.setup.validation import Mode, fixed_mode
from jdpo.words import figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """How many steps a run has.

    Attributes:
      num_steps: of training; None if it is not known.
      reference: "live", "cached" or "none".
      reference_steps: steps' worth of rows whose log-probs the reference computes once, before training; 0 without such
        a pass, or where the number of rows is not known.
      why: where the number of steps is from, or what is missing.
      notes: sentences on what else was assumed.
    """

    num_steps: int | None
    reference: str
    reference_steps: float
    why: str
    notes: tuple[str, ...] = ()


class SettledRun(NamedTuple):
    """The config of a run without what a run decides by itself, and its length."""

    config: TrainConfig
    length: RunLength


def settled_run(config: TrainConfig, rows: RowLengths, *, num_rows: int | None) -> SettledRun:
    """Returns how many steps a run has, and its config with `reference` settled.

    Args:
      num_rows: rows of an epoch; None: those of `rows`, if they are known.

    Raises:
      ValueError: a reference that does not fit the loss.
    """
    task = task_for(config)
    per_epoch = num_rows or rows.rows_per_epoch
    steps_per_epoch = per_epoch and num_steps_per_epoch(per_epoch, config.global_batch_size)
    if config.max_steps:
        num_steps: int | None = config.max_steps
        why = "max_steps of the config"
    elif steps_per_epoch and per_epoch:
        num_steps = num_steps_of(config.num_train_epochs, steps_per_epoch)
        epochs = config.num_train_epochs
        rows_of_epoch = figure(per_epoch, task.unit.removesuffix("s"))
        why = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'} of {rows_of_epoch}"
    else:
        num_steps = None
        why = "not known: give the number of rows as --num_rows N, or max_steps=N"
    mode, notes = _reference(config, task.uses_reference, num_steps, steps_per_epoch)
    reference_steps = 0.0
    if mode == "cached":
        every_row = num_rows or rows.num_rows
        if every_row:
            reference_steps = every_row / config.global_batch_size
        else:
            notes.append("the run time leaves out the reference's log-probs, as the number of rows is not known")
    if isinstance(config, DPOConfig) and mode != config.reference:
        config = dataclasses.replace(config, reference=mode)
    return SettledRun(
        config,
        RunLength(num_steps=num_steps, reference=mode, reference_steps=reference_steps, why=why, notes=tuple(notes)),
    )


def _reference(
    config: TrainConfig, needs_reference: bool, num_steps: int | None, steps_per_epoch: int | None
) -> tuple[Mode, list[str]]:
    """Returns the mode of the reference, and what was assumed."""
    if not isinstance(config, ReferenceSettings):
        return "none", []
    mode = fixed_mode(config.reference, needs_reference=needs_reference, sync_ref_model=config.sync_ref_model)
    if mode is not None or config.reference == "cached":
        return mode or "cached", []
    # As a run decides that finds nothing in the cache: a second pass over the rows pays for it.
    if num_steps is not None and steps_per_epoch is not None:
        repeats = num_steps > steps_per_epoch
    else:
        repeats = not config.max_steps and config.num_train_epochs > 1
    mode = "cached" if repeats else "live"
    why = "more than one pass" if repeats else "one pass"
    return mode, [f"reference auto is planned as {mode}: {why} over the rows, and nothing cached"]
