"""The verdict on a run in a few sentences, and its findings as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.reports.findings.series import Lines, RunMetrics, figures, last_quarter, share_interval
from jdpo.words import figure

MOST_EXPLAINED = 3
"""Findings that a terminal shows with evidence and advice; report.html and the model card show all of them."""


def verdict(lines: Lines, facts: RunFacts, findings: Sequence[Finding]) -> list[str]:
    """Returns a few sentences: how far the run came, what it reached, and what to think of it."""
    return [_progress(facts), *_reached(lines, facts), _judgement(facts, findings)]


def _progress(facts: RunFacts) -> str:
    of = f"{facts.step:,} of {figure(facts.num_steps, 'step')}"
    match facts.status:
        case "finished":
            exported = facts.exported_step
            which = f"; the exported model is that of step {exported:,}" if exported not in (None, facts.step) else ""
            return f"The run is finished after {figure(facts.step, 'step')}{which}."
        case "stopped":
            return f"The run was stopped after {of}; the same command continues it."
        case "failed":
            return f"The run failed after {of}."
        case _:
            return f"The run has made {of} so far."


def _reached(lines: Lines, facts: RunFacts) -> list[str]:
    metrics = RunMetrics(lines, has_reference=facts.has_reference)
    start = f" ({figures(facts.start_loss)} where policy equals reference)" if facts.start_loss is not None else ""
    losses, accuracies = metrics.held_out("loss"), metrics.held_out("rewards/accuracies")
    if losses:
        if not start and len(losses) > 1:
            start = f" ({figures(losses[0].value)} at step {losses[0].step:,})"
        of = f", accuracy {_with_interval(accuracies[-1].value, facts.num_eval_rows)}" if accuracies else ""
        return [f"Held-out loss at step {losses[-1].step:,}: {figures(losses[-1].value)}{start}{of}."]
    loss, accuracy = last_quarter(metrics.training("loss")), last_quarter(metrics.training("rewards/accuracies"))
    if loss is None:
        return ["No metrics were logged."]
    reached = f"Training loss {loss.where}: {figures(loss.value)}{start}"
    reached += f", accuracy {figures(accuracy.value)}" if accuracy else ""
    what = "pairs" if facts.command == "dpo" else "rows"
    if facts.num_eval_rows:
        return [f"{reached}. The held-out {what} were not evaluated yet."]
    return [f"{reached}. No {what} were held out, so nothing is known about new ones."]


def _with_interval(accuracy: float, num_pairs: int | None) -> str:
    if not num_pairs:
        return figures(accuracy)
    low, high = share_interval(accuracy, num_pairs)
    return f"{figures(accuracy)} ({figure(num_pairs, 'pair')}, 95 % interval {low:.2f} to {high:.2f})"


def _judgement(facts: RunFacts, findings: Sequence[Finding]) -> str:
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    if errors:
        return f"Do not use this model as it is: {_lower(errors[0].title)}."
    if warnings:
        more = f", and {figure(len(warnings) - 1, 'more warning')}" if len(warnings) > 1 else ""
        return f"Before you use the model, look at this: {_lower(warnings[0].title)}{more}."
    if facts.status == "finished":
        return "Nothing in its figures looks wrong; read some answers before you rely on it."
    if facts.status == "failed":
        return "Its figures up to there show nothing wrong; the error says what happened."
    return "Nothing in its figures looks wrong so far."


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Returns the findings as lines for a terminal: the most serious with evidence and advice, others by title."""
    found = []
    for number, finding in enumerate(findings):
        # With the code, under which docs/running.md explains it.
        found.append(f"{finding.level}: {finding.title} [{finding.key}]")
        if finding.level != "note" and number < MOST_EXPLAINED:
            found += [f"  {finding.evidence}", f"  {finding.advice}"]
    return found
