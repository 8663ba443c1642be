"""Findings about clipped gradients and a warm-up that takes most of the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jdpo.reports.findings.run_facts import Finding, Level, RunFacts
from jdpo.reports.findings.series import RunMetrics, figures, mean_of
from jdpo.words import figure, percent

OFTEN_CLIPPED = 0.3
"""Clipping is meant for rare steps. From this share on, max_grad_norm sets the size of the steps."""

FEW_STEPS = 10
"""With fewer steps a share of steps says little."""

FAR_ABOVE = 10.0
"""A typical gradient of this many times max_grad_norm is a sign of trouble, and not of a low max_grad_norm."""

MOSTLY_WARMUP = 0.5
"""Share of the steps in warm-up from which the learning rate was never high for long."""


def optimizer_findings(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about gradients and learning rate."""
    yield from _clipped(metrics, facts)
    yield from _warm_up(facts)


def _clipped(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    # In the warm-up gradients are large because little is learnt yet, and the rate is small anyway.
    points = metrics.training("grad_clipped").after(facts.warmup_steps)
    if facts.max_grad_norm is None or not points:
        return
    clipped = mean_of(points)
    if clipped.num_steps < FEW_STEPS or clipped.value <= OFTEN_CLIPPED:
        return
    norms = metrics.training("grad_norm").after(facts.warmup_steps)
    typical = float(np.median(norms.values)) if norms else 0.0
    after = " after the warm-up" if facts.warmup_steps else ""
    level: Level = "warning" if typical > FAR_ABOVE * facts.max_grad_norm else "note"
    yield Finding(
        "often_clipped",
        level,
        "Gradients are clipped in a large part of the steps",
        f"{percent(clipped.value)} of {figure(clipped.num_steps, 'step')}{after}; the typical gradient norm "
        f"is {figures(typical)}, max_grad_norm {facts.max_grad_norm:g}.",
        "Every clipped step counts the same, however large its gradient. If the loss falls smoothly, raise "
        "max_grad_norm to about the typical norm or leave it; if it jumps, lower learning_rate or lengthen the "
        "warm-up (warmup_ratio).",
    )


def _warm_up(facts: RunFacts) -> Iterator[Finding]:
    done = min(facts.step, facts.warmup_steps)
    # A run that is in progress is always mostly warm-up at first.
    if not facts.is_over or facts.step < FEW_STEPS or done <= MOSTLY_WARMUP * facts.step:
        return
    planned = facts.warmup_steps > MOSTLY_WARMUP * facts.num_steps
    advice = (
        f"Lower warmup_steps or warmup_ratio ({figure(facts.warmup_steps, 'step')} of {facts.num_steps:,} now); a "
        "tenth of the steps is usual."
        if planned
        else "Resume the run before you judge it: run the same command again."
    )
    yield Finding(
        "mostly_warm_up",
        "warning",
        "Most of the steps were warm-up, in which the learning rate is small",
        f"{done:,} of {figure(facts.step, 'step')} were warm-up.",
        advice,
    )
