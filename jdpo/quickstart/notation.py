"""Formats the figures of the report: shares and probabilities in percent, odds and factors without exponents."""

from __future__ import annotations

_LEAST_SHARE, _MOST_ODDS = 1e-5, 1e6


def percent(share: float) -> str:
    """Formats a share or a probability with one decimal, or with two digits if it is smaller than that shows.

    >>> percent(0.595), percent(0.0042), percent(0.00011), percent(1e-7), percent(0)
    ('59.5 %', '0.4 %', '0.011 %', '< 0.001 %', '0.0 %')
    """
    if 0 < share < _LEAST_SHARE:
        return "< 0.001 %"
    # Below 0.0005, one decimal would print 0.0.
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else f"{100 * share:.2g} %"


def odds(value: float) -> str:
    """
    >>> odds(2.0), odds(0.5), odds(8763.2), odds(1e9)
    ('2.0 : 1', '1 : 2.0', '8,763 : 1', '> 1,000,000 : 1')
    """
    if value < 1:
        return " : ".join(reversed(odds(1 / value).split(" : "))) if value > 0 else "0 : 1"
    return f"> {_MOST_ODDS:,.0f} : 1" if value > _MOST_ODDS else f"{factor(value)} : 1"


def factor(value: float) -> str:
    """
    >>> factor(1270.4), factor(110.3), factor(2.34)
    ('1,270', '110', '2.3')
    """
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"
