"""Figures in words and digits, the same in the terminal and on the page."""

from __future__ import annotations

from jdpo.comparison.compare_document import Figure, Unit
from jdpo.comparison.intervals import Estimate

MINUS = "−"
"""A minus sign as wide as a plus sign, so that columns of differences line up."""

POINTS = " points"
"""Unit of a difference of shares."""

_DIGITS: dict[Unit, int] = {"nats": 2, "nats/token": 3, "reward": 3}
_PERCENT = ("share", "points")
_NAMES: dict[Unit, str] = {"share": "", "points": "", "nats/token": "nats", "reward": ""}


def value_words(value: float, unit: Unit) -> str:
    """Formats a value.

    >>> value_words(0.625, "share"), value_words(-84.312, "nats"), value_words(41.26, "tokens")
    ('62.5 %', '−84.31', '41.3')
    """
    return _number(value, unit, signed=unit == "points") + {"share": " %", "points": POINTS}.get(unit, "")


def change_words(value: float, unit: Unit) -> str:
    """Formats a difference, with its sign; those of shares are percentage points.

    >>> change_words(0.031, "share"), change_words(-0.0001, "nats/token")
    ('+3.1 points', '0.000')
    """
    return _number(value, unit, signed=True) + (POINTS if unit in _PERCENT else "")


def interval_words(estimate: Estimate, unit: Unit, *, signed: bool = False) -> str:
    """Formats the interval of an estimate; empty if it has none.

    >>> interval_words(Estimate(0.5, 0.41, 0.59), "share"), interval_words(Estimate(1.0), "nats")
    ('41.0 to 59.0', '')
    """
    if estimate.low is None or estimate.high is None:
        return ""
    return " to ".join(_number(end, unit, signed=signed) for end in (estimate.low, estimate.high))


def unit_words(figure: Figure) -> str:
    """Returns the unit of a figure for its heading; empty if each value or the section has it, or there is none."""
    return "" if figure.section == "divergence" else _NAMES.get(figure.unit, figure.unit)


def _number(value: float, unit: Unit, *, signed: bool = False) -> str:
    digits = _DIGITS.get(unit, 1)
    shown = abs(100 * value if unit in _PERCENT else value)
    text = f"{shown:,.{digits}f}"
    if unit in _PERCENT and 0 < shown < 0.05:
        # Probabilities of facts may be small and still differ.
        text = f"{shown:.1g}" if shown >= 1e-4 else f"{shown:.0e}"
    # A value that rounds to zero has no sign.
    if not text.strip("0.,"):
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text
