"""A finding, and the facts about a run that findings are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""The most serious first: the model is of no use, something should be changed, something to know."""

Status = Literal["running", "finished", "stopped", "failed"]


class Finding(NamedTuple):
    """One thing that a run shows about itself. Its texts are plain text, safe for a terminal.

    Attributes:
      key: a code that stays the same between versions.
      title: one short sentence, without a full stop.
      evidence: the figures that show it, with their steps.
      advice: what to do, with the names of keys.
    """

    key: str
    level: Level
    title: str
    evidence: str
    advice: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run that the lines of metrics.jsonl do not hold, as plain values.

    Attributes:
      command: sft or dpo.
      step: updates made.
      num_steps: updates of the whole run.
      batch_size: rows per update.
      batch_parts: parts that the mesh splits a packed batch into; None if unknown, or if rows are padded.
      num_rows: training rows; None if unknown.
      num_eval_rows: held-out rows; None if there are none, or it is unknown.
      losses: names of the losses, and `rpo` for the term of rpo_alpha; empty for sft.
      has_reference: True if a loss compares with a reference.
      start_loss: the loss where policy and reference are equal; None if it depends on more, or without a reference.
      beta, learning_rate: as in the config; beta is None for sft.
      warmup_steps: updates in which the learning rate rises.
      max_grad_norm: None: gradients are not clipped.
      metric_for_best_model: name of the evaluation metric that ranks checkpoints.
      load_best_model_at_end: True if the best checkpoint is exported, not the last.
      exported_step: step of the exported model; None before the export.
      data: content of data.json, {"train": part, "eval": part or None} with the parts of `jdpo inspect`; None without.
      timing: seconds per phase of the run, as in run.json; empty if they were not measured.
      late_programs: programs that were not compiled ahead of their step.
      mirror: the copy in an object store, as in run.json; empty without.
    """

    command: str
    status: Status
    step: int
    num_steps: int
    batch_size: int
    batch_parts: int | None = None
    num_rows: int | None = None
    num_eval_rows: int | None = None
    losses: tuple[str, ...] = ()
    has_reference: bool = False
    start_loss: float | None = None
    beta: float | None = None
    learning_rate: float | None = None
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    metric_for_best_model: str = "eval_loss"
    load_best_model_at_end: bool = False
    exported_step: int | None = None
    data: Mapping[str, Any] | None = None
    timing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    late_programs: int = 0
    mirror: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """True if the run makes no more steps by itself."""
        return self.status != "running"

    def part(self, name: Literal["train", "eval"]) -> Mapping[str, Any]:
        """Returns the data summary of the training or the held-out rows; empty if there is none."""
        found = (self.data or {}).get(name)
        return found if isinstance(found, Mapping) else {}
