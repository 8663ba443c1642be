"""Findings about runs that have learnt nothing, and runs that are too small to show whether they have."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jdpo.reports.findings.run_facts import Finding, Level, RunFacts
from jdpo.reports.findings.series import (
    FEW_POINTS,
    SURE,
    Mean,
    RunMetrics,
    figures,
    has_changed,
    last_quarter,
    mean_of,
    share_interval,
)
from jdpo.words import figure

MOVED_NATS = 0.1
"""Below this change of its log-ratio a pair is as good as untouched: the odds of its answers changed by a tenth."""

MOVED_LOSS = 0.01
"""A loss that is further than this fraction from its start shows that pairs have moved."""

MOVED_EVALUATION = 0.002
"""A held-out supervised loss that fell by less than this fraction is where it was."""

FEW_PAIRS, MANY_PAIRS = 30, 200
"""From FEW_PAIRS on an accuracy near 0.5 means something (+- 0.18), from MANY_PAIRS on it is conclusive (+- 0.07)."""

FEW_EVAL_ROWS = 30
"""With fewer held-out rows, the 95 % interval of an accuracy spans more than 0.3."""

DEAD_LINES = 3
"""Last lines with a gradient of exactly 0 that are a fault: rounding alone gives no such line."""


def size_findings(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about runs of one row or step, and about few held-out rows."""
    if facts.num_rows == 1 or (facts.num_steps == 1 and facts.is_over):
        what = "row" if facts.num_rows == 1 else "step"
        yield Finding(
            "one_row_or_step",
            "warning",
            f"One {what} cannot show whether training works",
            f"{figure(facts.num_steps, 'step')}, {figure(facts.num_rows or facts.batch_size, 'row')}.",
            "Use this run only to check that everything starts. Its figures, good or bad, say nothing about the "
            "method; " + ("give more rows in datasets." if what == "row" else "raise max_steps or num_train_epochs."),
        )
    num = facts.num_eval_rows
    if num is not None and num < FEW_EVAL_ROWS and metrics.held_out("loss"):
        low, high = share_interval(0.5, num)
        spread = f"; an accuracy of 0.5 on {num} pairs is known only to lie between {low:.2f} and {high:.2f}"
        yield Finding(
            "few_eval_rows",
            "note",
            "There are too few held-out rows to measure progress",
            f"{figure(num, 'held-out row')}{spread if facts.command == 'dpo' else ''}.",
            "Hold out more rows (eval_fraction or eval_datasets); a few hundred tell small differences apart.",
        )


def dead_gradients(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields a finding if the gradient is exactly 0 at the end."""
    norms = metrics.training("grad_norm")
    dead = 0
    while dead < len(norms) and norms[-1 - dead].value == 0:
        dead += 1
    if dead < max(1, min(DEAD_LINES, len(norms))):
        return
    where = f"The gradient norm is exactly 0 from step {norms[-dead].step:,} to step {norms[-1].step:,}"
    losses = metrics.training("loss")
    if facts.losses == ("hinge",) and losses and losses[-1].value == 0:
        yield Finding(
            "margins_met",
            "note",
            "Every pair has reached the margin of hinge, and more steps change nothing",
            f"{where}; the loss is 0.",
            "Stop earlier (max_steps, num_train_epochs), or use sigmoid, which keeps pulling.",
        )
        return
    yield Finding(
        "dead_gradient",
        "error",
        "The gradient is 0: the model no longer learns",
        f"{where}.",
        "Likely causes are a learning_rate so high that the loss has become flat, or weights that are all 0 or too "
        "large for compute_dtype. Start again with a lower learning_rate, or with compute_dtype float32.",
    )


def learnt_nothing(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields a finding if the run, past its warm-up and its half, has not learnt what it was trained on."""
    if facts.step <= 1 or facts.step < max(facts.num_steps / 2, facts.warmup_steps):
        return
    if facts.command != "dpo":
        yield from _no_fall(metrics, finished=facts.status == "finished")
    elif facts.has_reference and facts.beta:
        yield from _not_moved(metrics, facts, facts.beta) or _at_chance(metrics, facts)
    else:
        yield from _no_progress(metrics)


def _rate(facts: RunFacts) -> str:
    return "learning_rate" if facts.learning_rate is None else f"learning_rate (now {facts.learning_rate:g})"


def _not_moved(metrics: RunMetrics, facts: RunFacts, beta: float) -> list[Finding]:
    """The policy is still the reference: the log-ratios of both sides are close to 0."""
    sides = {name: last_quarter(metrics.training(f"rewards/{name}")) for name in ("chosen", "rejected")}
    moved = {name: abs(mean.value) / beta for name, mean in sides.items() if mean is not None}
    margin, loss = (last_quarter(metrics.training(name)) for name in ("rewards/margins", "loss"))
    if not moved or margin is None or loss is None or max(*moved.values(), abs(margin.value) / beta) >= MOVED_NATS:
        return []
    # Pairs that moved to either side may have a mean of 0, which the loss shows.
    if facts.start_loss is not None and abs(loss.value - facts.start_loss) > MOVED_LOSS * abs(facts.start_loss):
        return []
    start = "" if facts.start_loss is None else f" (where policy equals reference: {figures(facts.start_loss)})"
    return [
        Finding(
            "learnt_nothing",
            "error" if facts.status == "finished" else "warning",
            "The policy has hardly moved from the reference",
            f"The log-prob of answers {margin.where} differs from the reference's by at most "
            f"{figures(max(moved.values()))} nats on average; margin {figures(margin.value)}, "
            f"loss {figures(loss.value)}{start}.",
            f"Raise {_rate(facts)} tenfold, and again if it is not enough, or train longer (num_train_epochs, "
            "max_steps). With a long warm-up (warmup_steps, warmup_ratio) most steps have a small rate.",
        )
    ]


def _at_chance(metrics: RunMetrics, facts: RunFacts) -> list[Finding]:
    """The policy has moved, but ranks the pairs that it trains on no better than a coin."""
    accuracy, loss = (last_quarter(metrics.training(name)) for name in ("rewards/accuracies", "loss"))
    if accuracy is None or loss is None:
        return []
    # Pairs that come up again in later epochs are no new evidence.
    pairs = accuracy.num_steps * facts.batch_size
    pairs = pairs if facts.num_rows is None else min(pairs, facts.num_rows)
    low, high = share_interval(accuracy.value, pairs)
    improved = facts.start_loss is not None and has_changed(_exactly(facts.start_loss), loss) < 0
    if pairs < FEW_PAIRS or low > 0.5 or improved:
        return []
    level: Level = "error" if facts.status == "finished" and pairs >= MANY_PAIRS else "warning"
    start = "" if facts.start_loss is None else f", against {figures(facts.start_loss)} at the start"
    return [
        Finding(
            "learnt_nothing",
            level,
            "There is no sign that the preferences were learnt",
            f"The accuracy on {figure(pairs, 'training pair')} {accuracy.where} is {figures(accuracy.value)} (95 % "
            f"interval {low:.2f} to {high:.2f}; chance is 0.5), the loss {figures(loss.value)}{start}.",
            "Look at some pairs (`jdpo inspect`): is chosen really better, and are the sides in the right columns? "
            f"Raise {_rate(facts)} by a factor of 3 to 10, or train longer (num_train_epochs, max_steps). If the "
            "rewards jump up and down, lower the rate instead.",
        )
    ]


def _exactly(value: float) -> Mean:
    return Mean(value, 0.0, 0, 0, 1)


def _no_progress(metrics: RunMetrics) -> Iterator[Finding]:
    """Without a reference there is no value to start from: the first quarter is compared with the last."""
    loss, accuracy = metrics.training("loss"), metrics.training("rewards/accuracies")
    if min(len(loss), len(accuracy)) < FEW_POINTS:
        return
    first, last = mean_of(loss[: len(loss) // 4]), last_quarter(loss)
    before, after = mean_of(accuracy[: len(accuracy) // 4]), last_quarter(accuracy)
    assert last is not None
    assert after is not None
    if has_changed(first, last) < 0 or has_changed(before, after) > 0:
        return
    yield Finding(
        "learnt_nothing",
        "warning",
        "Neither loss nor accuracy has improved beyond its noise",
        f"Loss {figures(first.value)} {first.where} and {figures(last.value)} {last.where}; accuracy "
        f"{figures(before.value)} and {figures(after.value)}.",
        "Raise learning_rate by a factor of 3 to 10, or train longer (num_train_epochs, max_steps).",
    )


def _no_fall(metrics: RunMetrics, *, finished: bool) -> Iterator[Finding]:
    """The loss of supervised fine-tuning has not fallen."""
    loss = metrics.training("loss")
    if len(loss) < FEW_POINTS:
        return
    half = len(loss) // 2
    before, after = mean_of(loss[:half]), mean_of(loss[half:])
    # Most of the fall may be within the first lines, which a mean over the first half hides.
    scatter = after.error * math.sqrt(len(loss) - half - 1)
    if has_changed(before, after) < 0 or loss[0].value - after.value > SURE * scatter:
        return
    if has_changed(before, after, by=0.02 * abs(before.value)) > 0:
        yield Finding(
            "loss_rises",
            "error",
            "The training loss rises",
            f"Loss {figures(before.value)} {before.where} and {figures(after.value)} {after.where}.",
            "Start again with a lower learning_rate, by a factor of 3 to 10, or with a warm-up (warmup_ratio 0.1).",
        )
        return
    # The same rows each time, so that they have no such noise.
    evaluated = metrics.held_out("loss")
    still = len(evaluated) > 1 and evaluated[0].value - evaluated[-1].value < MOVED_EVALUATION * evaluated[0].value
    there = f" Held-out loss {figures(evaluated[0].value)}, then {figures(evaluated[-1].value)}." if still else ""
    yield Finding(
        "learnt_nothing",
        "error" if still and finished else "warning",
        "The training loss has not fallen beyond its noise",
        f"Loss {figures(before.value)} {before.where} and {figures(after.value)} {after.where}.{there}",
        "Raise learning_rate by a factor of 3 to 10, or train longer (num_train_epochs, max_steps). If the model knew "
        "these rows before, there was nothing to learn from them.",
    )
