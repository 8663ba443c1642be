"""A finding of the diagnosis, and the words in which findings name processes and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from jdpo.doctor.process_facts import ProcessFacts
from jdpo.words import listed

T = TypeVar("T")

Level = Literal["ok", "warning", "problem", "skipped"]

MOST_NAMED = 3

ABSENT = "not there"
"""The value of an entry that a process does not have."""


class Finding(NamedTuple):
    """One line of the page.

    Attributes:
      level: what it means for a run.
      subject: what was checked.
      text: what was found.
      advice: what to do; "" if nothing is to be done.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""


def numbers(processes: Sequence[int]) -> str:
    """Returns the numbers of processes, with runs of them shortened.

    >>> numbers([2]), numbers([0, 1, 2, 5, 7, 8])
    ('process 2', 'processes 0-2, 5, 7, 8')
    """
    runs: list[list[int]] = []
    for process in sorted(processes):
        if runs and process == runs[-1][-1] + 1:
            runs[-1].append(process)
        else:
            runs.append([process])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"process{'' if len(processes) == 1 else 'es'} {', '.join(parts)}"


def named(processes: Sequence[int], facts: Sequence[ProcessFacts]) -> str:
    """Returns the numbers of processes and their hosts."""
    if len(facts) == 1:
        return "this process"
    hosts = list(dict.fromkeys(facts[process].host for process in processes))
    return f"{numbers(processes)} ({listed(hosts, MOST_NAMED)})"


def groups_of(values: Mapping[int, T]) -> list[tuple[T, list[int]]]:
    """Returns (value, processes that have it): the most frequent first, of equally frequent ones that of process 0.

    >>> groups_of({0: "b", 1: "a", 2: "a"})
    [('a', [1, 2]), ('b', [0])]
    """
    found: dict[T, list[int]] = {}
    for process, value in values.items():
        found.setdefault(value, []).append(process)
    return sorted(found.items(), key=lambda group: (-len(group[1]), group[1][0]))


def reasons_of(errors: Mapping[int, str | None]) -> list[tuple[str, list[int]]]:
    """Returns (error, processes that have it), as `groups_of` does, without the processes that have none."""
    return groups_of({process: error for process, error in errors.items() if error is not None})


def differences(
    tables: Mapping[int, Mapping[str, str]], absent: str = ABSENT
) -> dict[str, list[tuple[str, list[int]]]]:
    """Returns the entries that are not alike in all tables, as {name: groups of its values}.

    Args:
      tables: process -> its table.
      absent: the value of an entry that a table does not have.
    """
    names = dict.fromkeys(name for table in tables.values() for name in table)
    groups = {
        name: groups_of({process: table.get(name, absent) for process, table in tables.items()}) for name in names
    }
    return {name: found for name, found in groups.items() if len(found) > 1}


def in_words(name: str, groups: Sequence[tuple[str, list[int]]], facts: Sequence[ProcessFacts]) -> str:
    """Returns an entry that differs: what most processes have, and which ones have something else."""
    usual = groups[0][0]
    others = "; ".join(f"{value} on {named(processes, facts)}" for value, processes in groups[1:])
    return f"{name} is {others}, and {usual} elsewhere"


def groups_of_each(values: Mapping[int, Sequence[str]]) -> list[tuple[str, list[int]]]:
    """Returns (text, processes that have it among theirs), in order of appearance."""
    found: dict[str, list[int]] = {}
    for process, texts in values.items():
        for text in texts:
            found.setdefault(text, []).append(process)
    return list(found.items())
