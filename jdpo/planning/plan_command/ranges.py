"""Ranges of times and of money, as text."""

from __future__ import annotations

_UNITS = (
    (86400.0, "days", 48 * 3600.0),
    (3600.0, "h", 2 * 3600.0),
    (60.0, "min", 120.0),
    (1.0, "s", 1.0),
    (1e-3, "ms", 0.0),
)
"""(seconds, unit, from how many seconds on it is used)."""


def time_range(seconds: tuple[float, float]) -> str:
    """Returns a range of time in the unit of its upper end.

    >>> time_range((9.13, 14.2)), time_range((0.02, 0.0214)), time_range((5400, 9000)), time_range((3e5, 3e5))
    ('9.1-14 s', '20-21 ms', '1.5-2.5 h', '3.5 days')
    """
    size, unit, _ = next(each for each in _UNITS if max(seconds) >= each[2])
    return f"{number_range((seconds[0] / size, seconds[1] / size))} {unit}"


def money_range(cost: tuple[float, float], currency: str) -> str:
    """Returns a range of costs with its currency.

    >>> money_range((12.34, 17.8), "EUR"), money_range((1234, 1234), ""), money_range((0.012, 0.5), "USD")
    ('12-18 EUR', '1,200', '0.012-0.50 USD')
    """
    return f"{number_range(cost)} {currency}".rstrip()


def number_range(numbers: tuple[float, float]) -> str:
    """Returns a range with two digits that count, or a single number where both ends are alike.

    >>> number_range((1.04, 1.04)), number_range((0.38, 0.551)), number_range((0, 0))
    ('1.0', '0.38-0.55', '0')
    """
    low, high = map(two_digits, numbers)
    return low if low == high else f"{low}-{high}"


def two_digits(number: float) -> str:
    """Returns a number of at least 0 rounded to two digits that count.

    >>> [two_digits(number) for number in (0, 0.0123, 0.5, 9.96, 14.6, 149.0, 123456)]
    ['0', '0.012', '0.50', '10', '15', '150', '120,000']
    """
    if number <= 0:
        return "0"
    rounded = float(f"{number:.1e}")
    if rounded >= 10:
        return f"{rounded:,.0f}"
    digits = 1
    while rounded < 10 ** (1 - digits):
        digits += 1
    return f"{rounded:.{digits}f}"
