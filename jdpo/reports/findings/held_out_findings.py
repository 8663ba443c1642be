"""Findings about held-out rows: loss and accuracy worse than at the start, a gap to training, a best step long past."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jdpo.reports.findings.run_facts import Finding, Level, RunFacts
from jdpo.reports.findings.series import (
    SURE,
    Mean,
    Point,
    Points,
    RunMetrics,
    figures,
    last_quarter,
    mean_of,
    share_interval,
)
from jdpo.words import figure

WORSE = 0.01
"""A held-out loss counts as above that of the start from this fraction of it on; less is rounding."""

ACCURACY_GAP = 0.15
"""Training accuracy above held-out accuracy by more than this is learning by heart: most runs that generalise stay
within 0.1."""

LOSS_GAP = 0.2
"""The same for supervised losses, in nats per token, in addition to the gap of the first evaluation."""

NEAREST = 4
"""Training lines that an evaluation is compared with."""

LONG_PAST = 0.25
"""The best evaluation is long past if this fraction of the steps came after it, and at least two evaluations."""

FEWER = "Train for fewer steps (num_train_epochs, max_steps), lower learning_rate, or give more rows"


def held_out_findings(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about the evaluations of a run."""
    if facts.command == "dpo":
        yield from _worse_than_start(metrics, facts)
        # Where the sides are the wrong way round, a gap is no sign of learning by heart.
        yield from list(_below_chance(metrics, facts)) or _accuracy_gap(metrics, facts)
    else:
        yield from _loss_gap(metrics)
    yield from _best_long_past(metrics, facts)


def _worse_than_start(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    losses, margins = metrics.held_out("loss"), metrics.held_out("rewards/margins")
    start = facts.start_loss
    if start is None or not losses or not margins or losses[-1].value <= start * (1 + WORSE):
        return
    loss, margin = losses[-1], margins[-1].value
    sure = loss.value - start > SURE * _loss_error(loss.value, margin, start, facts.num_eval_rows)
    level: Level = "warning" if sure else "note"
    doubt = "" if sure else f"; with {figure(facts.num_eval_rows or 0, 'held-out row')} this may be chance"
    best = min(losses, key=lambda point: point.value)
    fell = f" The lowest was {figures(best.value)} at step {best.step:,}." if best.value < start else ""
    yield Finding(
        "held_out_loss_above_start",
        level,
        "On held-out pairs the model is worse than the one that it started from"
        if sure
        else "The held-out loss is above that of the start, perhaps by chance",
        f"Held-out loss {figures(loss.value)} at step {loss.step:,}, {'' if sure else 'slightly '}above "
        f"{figures(start)}{_ln2(start)}, its value where policy equals reference{doubt}.{fell}",
        f"{FEWER}. A loss above this value means that confident mistakes outweigh what was learnt; export the best "
        "step with load_best_model_at_end and eval_steps.",
    )


def _ln2(start: float) -> str:
    return " (ln 2)" if math.isclose(start, math.log(2), rel_tol=1e-6) else ""


def _loss_error(loss: float, margin: float, start: float, num_rows: int | None) -> float:
    """Estimates the standard error of a held-out loss, for which only the means of loss and margin are known."""
    if num_rows is None:
        return 0.0
    if not _ln2(start):
        return 0.5 * start / math.sqrt(num_rows)  # rows scatter by about half of the loss itself
    # softplus(-z) is ln 2 - z/2 + z^2/8 for small margins z, so both means give the scatter of z; the loss of a row
    # changes by sigmoid(-z) times that of its margin.
    variance = max(8 * (loss - start + margin / 2) - margin**2, 0.0)
    slope = max(0.5, 1 / (1 + math.exp(min(margin, 700.0))))
    return slope * math.sqrt(variance / num_rows)


def _below_chance(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    accuracies, margins = metrics.held_out("rewards/accuracies"), metrics.held_out("rewards/margins")
    # Without a reference, a model may well start by ranking most pairs the wrong way.
    if not accuracies or not margins or facts.num_eval_rows is None or not facts.has_reference:
        return
    accuracy, margin = accuracies[-1], margins[-1].value
    low, high = share_interval(accuracy.value, facts.num_eval_rows)
    # A tie counts as wrong, so a policy that is still the reference has accuracy 0, but no negative margin.
    if high >= 0.5 or margin >= 0:
        return
    yield Finding(
        "below_chance",
        "error",
        "The model prefers the rejected answers of held-out pairs",
        f"Held-out accuracy {figures(accuracy.value)} at step {accuracy.step:,} "
        f"({figure(facts.num_eval_rows, 'pair')}, 95 % interval {low:.2f} to {high:.2f}; chance is 0.5), margin "
        f"{figures(margin)}.",
        "Look at training and held-out pairs next to each other (`jdpo inspect`): chosen and rejected may be swapped "
        "in one of them, or they may differ in opposite ways, such as in length.",
    )


def _accuracy_gap(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    evaluated = metrics.held_out("rewards/accuracies")
    trained = last_quarter(metrics.training("rewards/accuracies"))
    if not evaluated or trained is None or facts.num_eval_rows is None:
        return
    there, last = evaluated[-1].value, evaluated[-1]
    pairs = trained.num_steps * facts.batch_size
    pairs = pairs if facts.num_rows is None else min(pairs, facts.num_rows)
    gap = trained.value - there
    # Of both shares together, as the test for equal shares has it; never 0, as no share is known exactly.
    share = (trained.value * pairs + there * facts.num_eval_rows + 1) / (pairs + facts.num_eval_rows + 2)
    error = math.sqrt(share * (1 - share) * (1 / pairs + 1 / facts.num_eval_rows))
    if gap <= ACCURACY_GAP or gap < SURE * error:
        return
    yield Finding(
        "overfit",
        "warning",
        "Training pairs are ranked much better than held-out pairs",
        f"Accuracy {figures(trained.value)} on the training pairs {trained.where}, {figures(there)} on "
        f"{figure(facts.num_eval_rows, 'held-out pair')} at step {last.step:,}.",
        f"The model learns pairs by heart. {FEWER}; LoRA (lora: true) and a larger beta also hold it back.",
    )


def _loss_gap(metrics: RunMetrics) -> Iterator[Finding]:
    evaluated, trained = metrics.held_out("loss"), metrics.training("loss")
    # Held-out rows may be harder from the start: the growth of the gap tells, which one evaluation does not show.
    if len(evaluated) < 2 or not trained:
        return
    (first, before), (last, after) = ((one, _around(trained, one)) for one in (evaluated[0], evaluated[-1]))
    growth = (last.value - after.value) - (first.value - before.value)
    noise = SURE * math.hypot(before.error, after.error)
    if growth <= max(LOSS_GAP, noise) or last.value - after.value <= LOSS_GAP:
        return
    yield Finding(
        "overfit",
        "warning",
        "The loss of training rows falls away from that of held-out rows",
        f"Step {last.step:,}: training loss {figures(after.value)}, held-out loss {figures(last.value)}; at step "
        f"{first.step:,} they were {figures(before.value)} and {figures(first.value)}.",
        f"The model learns rows by heart. {FEWER}; LoRA (lora: true) also holds it back.",
    )


def _around(points: Points, evaluated: Point) -> Mean:
    """Returns the mean of the training lines nearest to an evaluation: one alone is as noisy as its batches."""
    nearest = np.argsort(np.abs(points.steps - evaluated.step), kind="stable")[:NEAREST]
    return mean_of(points.at(np.sort(nearest)))


def _best_long_past(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    name = facts.metric_for_best_model.removeprefix("eval_")
    points = metrics.held_out(name)
    if len(points) < 4:
        return
    lower_is_better = name.endswith("loss")
    best = (min if lower_is_better else max)(points, key=lambda point: point.value)
    if lower_is_better and facts.start_loss is not None and best.value >= facts.start_loss:
        return  # the best model is the one before the first step, which another finding says
    after, last = points.after(best.step), points[-1]
    past = last.step - best.step
    if len(after) < 2 or past < LONG_PAST * last.step or not _worse(name, best, last, facts.num_eval_rows):
        return
    exported = facts.load_best_model_at_end and facts.exported_step in (None, best.step)
    level: Level = "note" if exported else "warning"
    remedy = (
        f"The model of step {best.step:,} is exported, as load_best_model_at_end asks; a shorter run saves time."
        if exported
        else "Set load_best_model_at_end, with save_steps equal to eval_steps so that the best step is saved, or "
        "train for fewer steps."
    )
    yield Finding(
        "best_long_past",
        level,
        "The best evaluation is long past",
        f"{facts.metric_for_best_model} was best at step {best.step:,} ({figures(best.value)}); at step {last.step:,} "
        f"it is {figures(last.value)}, after {figure(len(after), 'more evaluation')}.",
        remedy,
    )


def _worse(name: str, best: Point, last: Point, num_rows: int | None) -> bool:
    """Returns True if the last value is worse by more than a best of several equally good ones would be."""
    loss = abs(last.value - best.value)  # as the best is the best
    # Also of margins and the like, which are no shares of rows.
    if not name.startswith("rewards/accuracies") or not num_rows:
        # Between two evaluations the losses of the same rows change by about a tenth, some up and some down.
        return loss > max(WORSE, 0.1 / math.sqrt(num_rows or math.inf)) * abs(best.value)
    # The same rows at both steps, of which most are ranked alike: about half the variance of independent shares.
    return loss > math.sqrt(best.value * (1 - best.value) / num_rows) + WORSE
