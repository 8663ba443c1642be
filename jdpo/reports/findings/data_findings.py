"""Findings about the training rows that bear on what a run's figures mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.reports.findings.series import RunMetrics, figures, last_quarter
from jdpo.safe_text import terminal
from jdpo.words import figure, percent

OFTEN_CUT = 0.05
"""A cut answer has no end: with more than this share of them the model learns not to stop."""

LEAKED = 0.01
"""Share of held-out rows whose prompt is trained on, from which it matters for the figures."""

LENGTH_EXPLAINS = 0.65
"""Accuracy of always preferring the longer (or the shorter) answer from which length is a shortcut worth learning."""

CLEARLY = 0.001
"""Largest p-value at which more chosen answers are longer, or shorter, than by chance."""

OFTEN_REPEATED = 0.02
"""Repeated rows are trained on more often than others; a few in a hundred do not matter."""


def data_findings(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about rows that were cut, that repeat, or that length alone explains."""
    part = facts.part("train")
    yield from _leaked(facts)
    yield from _cut(part)
    yield from _repeated(part)
    yield from _length_explains(part.get("length_bias"), metrics)


def _leaked(facts: RunFacts) -> Iterator[Finding]:
    leaked = (facts.data or {}).get("leakage")
    if not leaked or not leaked["rows"] or not facts.num_eval_rows:
        return
    first = next((f", such as {one['eval']}, which is {one['train']}" for one in leaked["examples"]), "")
    yield Finding(
        "leakage",
        "warning" if leaked["share"] > LEAKED else "note",
        "Prompts of held-out rows are trained on",
        f"{leaked['rows']:,} of {figure(facts.num_eval_rows, 'held-out row')} ({percent(leaked['share'])})"
        f"{terminal(first)}.",
        "The held-out figures are too good by an unknown amount. Remove these rows, or hold out others: eval_fraction "
        "keeps rows of one prompt together.",
    )


def _cut(part: Mapping[str, Any]) -> Iterator[Finding]:
    cut = part.get("answer_cut")
    if not cut or cut["share"] <= OFTEN_CUT:
        return
    yield Finding(
        "often_cut",
        "warning",
        "Many answers are cut at the end",
        f"{figure(cut['rows'], 'row')} of {part['rows_kept']:,} ({percent(cut['share'])}){_first(cut)}.",
        "A cut answer does not show the model where to stop. Raise max_length, or leave the longest rows out.",
    )


def _repeated(part: Mapping[str, Any]) -> Iterator[Finding]:
    found = part.get("repeats", {})
    same, swapped = found.get("same_row"), found.get("contradictions")
    if same and same["share"] > OFTEN_REPEATED:
        yield Finding(
            "repeated_rows",
            "warning",
            "Many rows are copies of others",
            f"{figure(same['rows'], 'row')} of {part['rows_kept']:,} ({percent(same['share'])}){_first(same)}.",
            "Copies count several times, and if they are held out as well, the held-out figures are too good. Remove "
            "them from the files.",
        )
    if swapped and swapped["share"] > OFTEN_REPEATED:
        yield Finding(
            "contradicting_rows",
            "warning",
            "Many pairs contradict each other",
            f"{figure(swapped['rows'], 'row')} of {part['rows_kept']:,} "
            f"({percent(swapped['share'])}){_first(swapped)}: another row has the same prompt and answers, with "
            "chosen and rejected swapped.",
            "Nothing can be learnt from such pairs. Remove them, or set label_smoothing for labels that are partly "
            "wrong.",
        )


def _first(count: Mapping[str, Any]) -> str:
    return f", the first is {terminal(count['first'])}" if count.get("first") else ""


def _length_explains(bias: Mapping[str, Any] | None, metrics: RunMetrics) -> Iterator[Finding]:
    if not bias or bias["p_value"] is None or bias["p_value"] > CLEARLY:
        return
    way = "longer" if bias["share_longer"] > 0.5 else "shorter"
    by_length = bias[f"{way}_accuracy"]
    if by_length < LENGTH_EXPLAINS:
        return
    rows, reached = "held-out", last_quarter(metrics.held_out("rewards/accuracies")[-1:])
    if reached is None:
        rows, reached = "training", last_quarter(metrics.training("rewards/accuracies"))
    model = f"; the model's {rows} accuracy is {figures(reached.value)}" if reached else ""
    # A model that ranks clearly better than length does has learnt something else as well.
    beyond = reached is not None and reached.value > by_length + 0.05
    yield Finding(
        "length_explains",
        "note" if beyond else "warning",
        f"Length {'explains most of' if beyond else 'alone explains'} which answer is chosen",
        f"Always preferring the {way} answer is right for {percent(by_length)} of {figure(bias['pairs'], 'pair')} "
        f"(mean {bias['mean_chosen']:.0f} tokens chosen, {bias['mean_rejected']:.0f} rejected){model}.",
        f"The model may learn to answer at {'greater' if way == 'longer' else 'less'} length and nothing else. Balance "
        "the lengths in the data, or try loss_type sigmoid_norm or ld_alpha; compare the lengths of its answers "
        "(`jdpo compare`).",
    )
