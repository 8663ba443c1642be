"""Conditions of --fail_if: what they read, and what is refused before anything is computed."""

from __future__ import annotations

import pytest

from jdpo.comparison.compare_document import ComparedModel, Comparison, Figure, Values, Verdict
from jdpo.comparison.fail_if import NEEDS, failures, parse_condition
from jdpo.comparison.intervals import Estimate

ALL = ["--pairs", "--prompts", "--facts", "a judge"]

COMPARISON = Comparison(
    after=ComparedModel(name="after", path="after", digest="", dtype="float32"),
    verdict=Verdict(better=(), worse=(), changed=(), unclear=(), unchanged=()),
    figures={
        "facts.accuracy": Figure(
            name="facts.accuracy",
            title="Known facts",
            section="facts",
            unit="share",
            better="up",
            all=Values(
                before=Estimate(0.8),
                after=Estimate(0.7),
                difference=Estimate(-0.1, -0.2, 0.05),
                num_prompts=20,
                num_rows=20,
            ),
        ),
        "kl": Figure(
            name="kl",
            title="KL",
            section="divergence",
            unit="nats",
            better="neither",
            all=Values(after=Estimate(12.0), num_prompts=1, num_rows=1),
            neutral=None,
        ),
    },
)


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("kl > 20", False),
        ("kl>11.5", True),
        ("kl <= 12", True),
        ("facts.accuracy < -0.02", True),  # the difference
        ("facts.accuracy.low < -0.15", True),
        ("facts.accuracy.high < 0", False),
        ("facts.accuracy.before >= .8", True),
        ("facts.accuracy.after > 7e-1", False),
    ],
)
def test_conditions_read_differences_values_and_intervals(text: str, fails: bool) -> None:
    assert bool(failures([parse_condition(text, ALL)], COMPARISON)) is fails


@pytest.mark.parametrize("text", ["margin < 0", "kl.high > 20", "kl.before > 1"])
def test_what_cannot_be_decided_fails(text: str) -> None:
    (line,) = failures([parse_condition(text, ALL)], COMPARISON)
    assert "cannot be decided" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl", "expected NAME"),
        ("kl > high", "expected NAME"),
        ("kl > 20 or True", "expected NAME"),
        ("fact.accuracy < 0", "facts.accuracy"),
        ("nothing_like_it < 0", "win_rate"),
        ("__import__ > 0", "no figure"),
    ],
)
def test_other_texts_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_condition(text, ALL)


@pytest.mark.parametrize("name", [*NEEDS, "answers.script.Latin"])
def test_a_figure_needs_its_rows(name: str) -> None:
    assert parse_condition(f"{name} < 0", ALL).name == name
    with pytest.raises(ValueError, match="not given"):
        parse_condition(f"{name} < 0", [])
