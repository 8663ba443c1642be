"""Wording that messages of all packages share: counts, amounts of memory, times, lists of names, suggestions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def figure(count: float, unit: str) -> str:
    """Returns a count with its unit, which is plural unless the count is one.

    >>> figure(1, "row"), figure(2000, "row"), figure(0, "step")
    ('1 row', '2,000 rows', '0 steps')
    """
    return f"{count:,.0f} {unit}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """Returns a span of time as hours, minutes and seconds.

    >>> clock(3725.4)
    '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def percent(share: float) -> str:
    """Formats a share as a percentage with about two significant digits.

    >>> percent(0.5), percent(0.0312), percent(0.00004), percent(0)
    ('50 %', '3.1 %', '< 0.01 %', '0 %')
    """
    if 0 < share < 1e-4:
        return "< 0.01 %"
    digits = 0 if share >= 0.0995 or share == 0 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"


def memory(num_bytes: float) -> str:
    """Returns an amount of memory in GiB, MiB or bytes: the largest unit that shows two significant digits.

    >>> memory(3 * 2**29), memory(5 * 2**20), memory(340_000), memory(12)
    ('1.50 GiB', '5.00 MiB', '0.32 MiB', '12 bytes')
    """
    if num_bytes >= 0.01 * 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 0.01 * 2**20:
        return f"{num_bytes / 2**20:.2f} MiB"
    return figure(num_bytes, "byte")


def listed(names: Sequence[str], most: int) -> str:
    """Joins at most `most` names, and counts the others.

    >>> listed(["a", "b", "c"], 3), listed(["a", "b", "c", "d"], 2)
    ('a, b, c', 'a, b and 2 more')
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to `name`, or None if none is similar.

    Args:
      cutoff: how similar a name must be, from 0 (anything) to 1 (equal).

    >>> nearest("learning_rat", ["batch_size", "learning_rate"]), nearest("xyz", ["batch_size"])
    ('learning_rate', None)
    """
    import difflib

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Returns a question for the message about an unknown name; empty if no known name is similar.

    >>> did_you_mean("sigmod", ["ipo", "sigmoid"]), did_you_mean("xyz", ["ipo", "sigmoid"])
    ("did you mean 'sigmoid'?", '')
    """
    candidate = nearest(name, known, cutoff=cutoff)
    return f"did you mean {candidate!r}?" if candidate is not None else ""
