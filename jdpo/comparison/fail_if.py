"""Conditions of `--fail_if`, such as "kl > 20": read before anything is computed, and checked at the end."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from jdpo.comparison.compare_document import Comparison, Figure
from jdpo.safe_text import terminal
from jdpo.words import did_you_mean, listed

PARTS = ("before", "after", "low", "high")
"""Words that may follow a name: the figure of one model, or an end of the interval of what is tested."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([\w.]+?)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")

SCRIPTS = "answers.script."
"""Figures whose names depend on the answers start so."""

NEEDS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "accuracy",
            "accuracy.length_only",
            "accuracy.over_length",
            "accuracy.logps",
            "accuracy.logps_per_token",
            "margin",
            "logps.chosen",
            "logps.rejected",
            "logps_per_token.chosen",
            "logps_per_token.rejected",
            "chosen_fell",
            "calibration.error",
            "calibration.overconfidence",
        ),
        "--pairs",
    ),
    **dict.fromkeys(
        (
            "kl",
            "kl_per_token",
            "kl_per_token.on_before",
            "kl_reverse",
            "kl_reverse_per_token",
            "kl_reverse_per_token.on_after",
            "answers.length",
            "answers.cut_off",
            "answers.empty",
            "answers.repetition",
        ),
        "--prompts",
    ),
    "win_rate": "a judge",
    "win_rate.length_controlled": "a judge",
    "win_rate.first_shown": "a judge",
    **dict.fromkeys(("facts.probability", "facts.accuracy", "facts.fell"), "--facts"),
}
"""Name of a figure -> the option without which there is none."""


class Condition(NamedTuple):
    """A condition under which the command fails.

    Attributes:
      text: as it was given.
      name: of the figure.
      part: one of PARTS, or empty for the difference, or the value of a figure without one.
      sign: the operator.
      bound: the number.
    """

    text: str
    name: str
    part: str
    sign: str
    bound: float


def parse_condition(text: str, given: Iterable[str]) -> Condition:
    """Parses NAME OPERATOR NUMBER.

    Args:
      given: the options of NEEDS that are given.

    Raises:
      ValueError: it is no such condition, no figure has this name, or it needs an option that is not given.

    >>> parse_condition("facts.accuracy < -0.02", ["--facts"])
    Condition(text='facts.accuracy < -0.02', name='facts.accuracy', part='', sign='<', bound=-0.02)
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--fail_if {terminal(text)!r}: expected NAME, one of < <= > >=, and a number, as in 'kl > 20'"
        )
    name, part = match[1], ""
    if name not in NEEDS and name.rpartition(".")[2] in PARTS:
        name, _, part = name.rpartition(".")
    need = "--prompts" if name.startswith(SCRIPTS) else NEEDS.get(name)
    if need is None:
        hint = did_you_mean(name, NEEDS) or f"the names are {listed(sorted(NEEDS), len(NEEDS))}"
        raise ValueError(f"--fail_if {terminal(text)!r}: there is no figure {name!r}; {hint}")
    if need not in given:
        need = need if need.startswith("--") else f"{need}: --judge, --reward or --by"
        raise ValueError(f"--fail_if {terminal(text)!r}: {name} needs {need}, which is not given")
    return Condition(text.strip(), name, part, match[2], float(match[3]))


def failures(conditions: Iterable[Condition], comparison: Comparison) -> list[str]:
    """Returns a line for each condition that holds, or that cannot be decided."""
    lines = []
    for condition in conditions:
        figure = comparison.figures.get(condition.name)
        value = None if figure is None else _value(figure, condition.part)
        if value is None:
            # A check that cannot be made must not pass.
            lines.append(f"{condition.text}: cannot be decided, as there is no such value")
        elif _OPERATORS[condition.sign](value, condition.bound):
            lines.append(f"{condition.text}: it is {value:.6g}")
    return lines


def _value(figure: Figure, part: str) -> float | None:
    if part == "before":
        return None if figure.all.before is None else figure.all.before.value
    if part == "after":
        return figure.all.after.value
    if part == "low":
        return figure.tested.low
    return figure.tested.high if part == "high" else figure.tested.value
