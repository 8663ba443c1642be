"""Writes the tables of docs/losses.md from jdpo/loss_specs.py.

    python scripts/write_loss_tables.py            # after a loss or an option was added or changed

Each table is between `<!-- table: NAME -->` and `<!-- end -->`; everything else in the file is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from jdpo.loss_specs import BATCH_OPTIONS, F_DIVERGENCES, LOSSES, OPTIONS, SHARED_OPTIONS

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _default(name: str) -> str:
    """Returns a default as YAML has it.

    >>> _default("cpo_alpha"), _default("bco_running_delta"), _default("ld_alpha")
    ('1', 'false', 'null')
    """
    default = OPTIONS[name].default
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return default if isinstance(default, str) else f"{default:g}"


def formulas() -> str:
    """The loss of a pair, its paper, and its value where the policy equals the reference."""

    def source(text: str) -> str:
        return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)

    rows = ((_code(name), _code(spec.formula), source(spec.source), spec.start) for name, spec in LOSSES.items())
    return _table(("name", "loss of a pair", "source", "at the start"), rows)


def choices() -> str:
    """The needs of a loss and when to use it."""
    rows = (
        (
            _code(name),
            ", ".join(spec.needs),
            ", ".join(f"`{option}` {_default(option)}" for option in spec.own_options),
            spec.use,
        )
        for name, spec in LOSSES.items()
    )
    return _table(("name", "needs", "options of its own", "when to use it"), rows)


def effects() -> str:
    """The push of a loss on the chosen answer."""
    rows = ((_code(name), _code(spec.push), spec.kind, spec.keeps_chosen) for name, spec in LOSSES.items())
    return _table(("name", "push on l_w", "kind", "does it keep the chosen answer probable?"), rows)


def options() -> str:
    """Every option with its default and range."""

    def allowed(name: str) -> str:
        option = OPTIONS[name]
        return option.range if option.bounds or option.is_number else ""

    rows = ((_code(name), _default(name), allowed(name), option.description) for name, option in OPTIONS.items())
    of_batches = ((_code(name), "", "", f"{text} Only in Python.") for name, text in BATCH_OPTIONS.items())
    return _table(("option", "default", "range", "meaning"), (*rows, *of_batches))


def divergences() -> str:
    """The score that replaces a log-ratio, for each f-divergence."""
    return _table(("divergence", "score of a log-ratio r"), (tuple(map(_code, row)) for row in F_DIVERGENCES.items()))


def honoured() -> str:
    """The options that each loss honours."""
    rows = (
        (
            _code(name),
            *("yes" if set(group) <= set(spec.options) else "" for group in SHARED_OPTIONS),
            _code(*spec.own_options),
        )
        for name, spec in LOSSES.items()
    )
    return _table(("name", *(_code(*group) for group in SHARED_OPTIONS), "of its own"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "formulas": formulas,
    "choices": choices,
    "effects": effects,
    "options": options,
    "divergences": divergences,
    "honoured": honoured,
}
"""Name in the guide and what writes it."""


def with_tables(text: str) -> str:
    """Returns the text of the guide with every table as the declarations have it.

    Raises:
      ValueError: a table is missing or unknown.
    """
    found = re.findall(r"^<!-- table: (\w+) -->$", text, flags=re.M)
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"expected the tables {sorted(TABLES)} once each, found {sorted(found)}")

    def written(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n<!-- end -->\n"

    return re.sub(r"^<!-- table: (\w+) -->\n.*?^<!-- end -->\n", written, text, flags=re.M | re.S)


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
