"""Figures in messages, as people write them."""

from __future__ import annotations


def figure(count: float, unit: str) -> str:
    """A count with its unit, in the plural unless it is one.

    >>> figure(1, "row"), figure(2000, "row"), figure(0, "step")
    ('1 row', '2,000 rows', '0 steps')
    """
    return f"{count:,.0f} {unit}{'' if count == 1 else 's'}"


def memory(num_bytes: float) -> str:
    """An amount of memory in the largest unit in which it shows.

    >>> memory(3 * 2**29), memory(5 * 2**20), memory(340_000), memory(12)
    ('1.50 GiB', '5.00 MiB', '0.32 MiB', '12 bytes')
    """
    if num_bytes >= 0.01 * 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 0.01 * 2**20:
        return f"{num_bytes / 2**20:.2f} MiB"
    return figure(num_bytes, "byte")
