"""The verdict in plain sentences, which are chosen and filled in by the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from jdpo.comparison.compare_document import ComparedFact, Figure, Finding, Values, Verdict
from jdpo.comparison.figure_words import change_words, interval_words, value_words
from jdpo.words import figure as counted
from jdpo.words import listed

MOST_FACTS = 3

TOLD = (
    "accuracy",
    "accuracy.logps",
    "margin",
    "logps.chosen",
    "answers.length",
    "answers.cut_off",
    "answers.repetition",
    "win_rate",
    "win_rate.length_controlled",
    "facts.probability",
    "facts.accuracy",
)
"""Figures that are named also where nothing can be told; others are in the table."""


PER_TOKEN = {
    "accuracy.logps_per_token": "accuracy.logps",
    "logps_per_token.chosen": "logps.chosen",
    "logps_per_token.rejected": "logps.rejected",
}
"""Figures per token -> their totals; one sentence is enough where both agree."""


def verdict_of(figures: Iterable[Figure], facts: Sequence[ComparedFact]) -> Verdict:
    """Sorts the tested figures into what got better, worse, changed or did not, and what cannot be told."""
    found: dict[Finding, list[str]] = {finding: [] for finding in get_args(Finding)}
    by_name = {figure.name: figure for figure in figures}
    for figure in by_name.values():
        total = by_name.get(PER_TOKEN.get(figure.name, ""))
        if total is not None and total.finding == figure.finding:
            continue
        if figure.finding == "unchanged":
            found["unchanged"] += [_unchanged(figure)] if figure.name in TOLD else []
        elif figure.finding is not None and (figure.finding != "unclear" or _is_told(figure)):
            found[figure.finding].append(_sentence(figure))
        elif figure.name == "kl" and figure.all.after.value > 0:
            # A distance is never 0 and never good or bad by itself; it is what the rest was paid with.
            found["changed"].append(_distance(figure))
        found["worse"] += _worse_datasets(figure)
    if (rule := by_name.get("accuracy.over_length")) and by_name["accuracy"].finding == "better":
        found["unclear"] += _like_lengths(rule)
    if fell := [fact for fact in facts if fact.fell]:
        found["worse"].append(_fallen(fell, len(facts)))
    if not any(sentences for finding, sentences in found.items() if finding != "unchanged"):
        found["unchanged"] = ["No figure differs between the two models."]
    return Verdict(**found)


def _is_told(figure: Figure) -> bool:
    """Returns whether to name a figure of which nothing can be told: not if nothing changed at all."""
    change, neutral = figure.tested.value, figure.neutral
    return figure.name in TOLD and change != neutral


def _sentence(figure: Figure) -> str:
    values, unit = figure.all, figure.unit
    if values.difference is None or values.before is None:
        equal = f"; two equal models have {value_words(figure.neutral or 0, unit)}"
        return f"{figure.title}: {value_words(values.after.value, unit)}{_interval(figure, values)}{equal}."
    before, after = (value_words(one.value, unit) for one in (values.before, values.after))
    change = change_words(values.difference.value, unit)
    return f"{figure.title}: from {before} to {after}, {change}{_interval(figure, values)}."


def _unchanged(figure: Figure) -> str:
    both = "" if figure.all.difference is None else " before and after"
    return f"{figure.title}: {value_words(figure.all.after.value, figure.unit)}{both}."


def _interval(figure: Figure, values: Values) -> str:
    is_change = values.difference is not None
    words = interval_words(values.difference or values.after, figure.unit, signed=is_change)
    if not words:
        return " (one prompt alone, so without an interval)"
    p_value = ""
    if values.p_value is not None:
        p_value = ", p < 0.001" if values.p_value < 0.001 else f", p = {values.p_value:.2g}"
    return f" (95 % interval {words}, {counted(values.num_prompts, 'prompt')}{p_value})"


def _distance(figure: Figure) -> str:
    return f"{figure.title}: {value_words(figure.all.after.value, figure.unit)} nats{_interval(figure, figure.all)}."


def _like_lengths(figure: Figure) -> Iterator[str]:
    """Says so if a rule that reads lengths alone may be as accurate as the model."""
    low = figure.all.after.low
    if low is None or low <= 0:
        yield (
            "Whether the implicit reward is more accurate than a rule that reads lengths alone: "
            f"{value_words(figure.all.after.value, figure.unit)}{_interval(figure, figure.all)}."
        )


def _worse_datasets(figure: Figure) -> Iterator[str]:
    """Names datasets that got worse while all rows together did not."""
    if figure.finding == "worse":
        return
    for label, values in figure.datasets.items():
        if figure.finding_of(values) == "worse":
            yield _sentence(dataclasses.replace(figure, title=f"{figure.title}, dataset {label}", all=values))


def _fallen(fell: Sequence[ComparedFact], num_facts: int) -> str:
    examples = [f"{fact.answer!r} ({100 * fact.before:.0f} % to {100 * fact.after:.0f} %)" for fact in fell]
    return f"The right answer lost more than 5 points for {len(fell)} of {counted(num_facts, 'fact')}: " + (
        listed(examples, MOST_FACTS) + "."
    )
