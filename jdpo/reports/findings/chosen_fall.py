"""The finding about a falling log-prob of the chosen answers while accuracy stays where it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from jdpo.loss_specs import LOSSES
from jdpo.reports.findings.run_facts import Finding, Level, RunFacts
from jdpo.reports.findings.series import SURE, Mean, Points, RunMetrics, figures, mean_of

CHOSEN_FALL = 5.0
"""Nats that an answer may lose unnoticed: its probability is then 150 times smaller. Some fall is part of DPO."""

FALL_PER_TOKEN = 0.1
"""Nats per token from which the fall is a warning: each token is then a tenth less probable, so that sampled answers
differ from the chosen ones. Long answers lose 5 nats without any visible change."""

LARGE_FALL = 20.0
"""The same where the length of the answers is unknown: that of an answer of 200 tokens."""

FLAT = 0.02
"""A rise of accuracy up to this much does not pay for the fall."""

FEW_EVALUATIONS = 3

SECTION = '"Why does the log-prob of the chosen answer fall?" in docs/running.md of jdpo'


class _Stage(NamedTuple):
    """A part of the run: its mean accuracy, and log-prob of the chosen answers."""

    accuracy: Mean
    chosen: Mean


def chosen_fall(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields a finding if chosen answers lost log-prob over a part of the run in which accuracy did not rise."""
    # Some losses are meant to lower both sides.
    if facts.command != "dpo" or any(LOSSES[name].kind == "down" for name in facts.losses if name in LOSSES):
        return
    # The same rows each time, so that there is no noise of the batches; training lines if there are few evaluations.
    of_rows = len(metrics.held_out("rewards/accuracies")) >= FEW_EVALUATIONS
    stages = _stages(metrics, facts, of_rows)
    if len(stages) < 2:
        return
    last = stages[-1]
    for stage in stages[:-1]:
        fall = stage.chosen.value - last.chosen.value
        # A single evaluation has no scatter, and needs none.
        error = 0.0 if of_rows else math.hypot(stage.chosen.error, last.chosen.error)
        flat = last.accuracy.value - stage.accuracy.value <= FLAT
        if flat and fall > CHOSEN_FALL and not fall < SURE * error:
            yield _finding(facts, stage, last, fall, "held-out" if of_rows else "training")
            return


def _stages(metrics: RunMetrics, facts: RunFacts, of_rows: bool) -> list[_Stage]:
    """Cuts the run into four parts, or fewer if it has fewer lines, after its start."""
    read = metrics.held_out if of_rows else metrics.training
    accuracy = read("rewards/accuracies")
    if facts.has_reference and facts.beta:
        # Against the reference on the same rows: the log-probs themselves vary much more, as lengths do.
        chosen = read("rewards/chosen").over(facts.beta)
        start = [_Stage(_at_start(0.5), _at_start(0.0))]
    else:
        chosen, start = read("logps/chosen"), []
    if not accuracy or len(accuracy) != len(chosen):
        return []
    return start + [
        _Stage(mean_of(one), mean_of(other)) for one, other in zip(_parts(accuracy), _parts(chosen), strict=True)
    ]


def _at_start(value: float) -> Mean:
    return Mean(value, 0.0, 0, 0, 1)


def _parts(points: Points, most: int = 4) -> list[Points]:
    num = min(most, len(points))
    bounds = [round(number * len(points) / num) for number in range(num + 1)]
    return [points[low:high] for low, high in itertools.pairwise(bounds)]


def _finding(facts: RunFacts, before: _Stage, after: _Stage, fall: float, rows: str) -> Finding:
    tokens = facts.part("train").get("lengths", {}).get("chosen", {}).get("mean")
    per_token = f" ({figures(fall / tokens)} per token)" if tokens else ""
    large = fall / tokens > FALL_PER_TOKEN if tokens else fall > LARGE_FALL
    level: Level = "warning" if large else "note"
    from_start = before.chosen.last == 0
    began = "the start" if from_start else f"step {before.chosen.middle:,}"
    then = "chance" if from_start else figures(before.accuracy.value)
    keeps = "" if "rpo" in facts.losses else ", or add rpo_alpha: 1.0, which holds the chosen answers up"
    return Finding(
        "chosen_falls",
        level,
        "Chosen answers became less probable while accuracy did not rise",
        f"Between {began} and step {after.chosen.middle:,} (means around these steps) the log-prob of {rows} chosen "
        f"answers fell by {figures(fall)} nats{per_token}; their accuracy went from {then} to "
        f"{figures(after.accuracy.value)}.",
        "The loss sees only the difference between chosen and rejected, so both may fall. That is harmless while "
        "held-out accuracy rises and sampled answers stay good (sample_prompts); here the steps since then brought no "
        "better ranking. Make fewer of them (max_steps, load_best_model_at_end), lower learning_rate, raise "
        f"beta{keeps}. See {SECTION}.",
    )
