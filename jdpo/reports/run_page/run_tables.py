"""The tables on the page of a run: figures at start and end, settings, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdpo.config import CONFIGS, DatasetConfig, LoraConfig, defaults_of
from jdpo.config.key_specs import as_yaml, key_specs
from jdpo.reports.run_page.curve_plots import number_words
from jdpo.reports.run_page.curves import RunCurves
from jdpo.reports.run_page.page_run import PageRun
from jdpo.words import clock, memory, percent

FIGURES = {
    "loss": "loss",
    "rewards/accuracies": "pairs ranked right",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of the chosen answers",
    "rewards/rejected": "reward of the rejected answers",
    "logps/chosen": "log-probability of the chosen answers",
    "logps/rejected": "log-probability of the rejected answers",
}
"""Metrics of the table of figures, and their names there."""

ROUNDING = 1e-6

OF_THE_PLACE = frozenset({"output_dir", "cache_dir", "mirror"})
"""Keys that differ between runs because they have folders of their own."""

PHASES = {
    "data": "reading and tokenizing rows",
    "reference": "log-probs of the reference",
    "load": "loading weights",
    "compile": "waiting for compiled programs",
    "data_wait": "steps waiting for data",
    "step": "training steps",
    "evaluation": "evaluation",
    "sampling": "sampling answers",
    "save": "saving checkpoints",
    "export": "exporting the model",
    "other": "everything else",
}
"""Phases of `timing` in run.json, in words."""


class Table(NamedTuple):
    """A table: titles of its columns, and its rows, whose first cell names them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Setting(NamedTuple):
    """A key of the config.

    Attributes:
      values: one for each run, as YAML; empty if the run has no such key.
      default: as YAML; empty if the key has none.
      differs: True if the runs have different values.
      about: what the key does.
    """

    key: str
    values: Sequence[str]
    default: str
    differs: bool
    about: str


class TimeSpent(NamedTuple):
    """Seconds of a run in one phase: in words, and as a share of all."""

    phase: str
    words: str
    share: float


def figures_of_one(curves: RunCurves) -> Table | None:
    """Returns the figures of a run at its start and at its end, in training and on held-out rows."""
    sides = {"training": "", "held-out": "eval_"}
    sides = {side: prefix for side, prefix in sides.items() if any(prefix + name in curves for name in FIGURES)}
    columns = ["", *(f"{side}, {when}" for side in sides for when in ("first", "last"))]
    rows = []
    for name, words in FIGURES.items():
        cells = [_end(curves, prefix + name, place) for prefix in sides.values() for place in (0, -1)]
        if any(cells):
            rows.append([words, *cells])
    return Table(columns, rows) if rows else None


def figures_of_several(
    runs: Sequence[PageRun], curves: Sequence[RunCurves], prefix: str, *, differences: bool
) -> Table | None:
    """Returns the last figures of several runs next to each other.

    Args:
      prefix: "eval_" for those on held-out rows, else empty.
      differences: True adds the difference from the first run, in brackets, to the figures of the others.
    """
    rows = []
    for name, words in FIGURES.items():
        cells = [_end(one, prefix + name, -1) for one in curves]
        for number, one in enumerate(curves):
            if differences and number and all(prefix + name in both for both in (one, curves[0])):
                change = float(one[prefix + name].y[-1] - curves[0][prefix + name].y[-1])
                sign = "+" if change >= ROUNDING else ""
                cells[number] += f" ({sign}{number_words(0.0 if abs(change) < ROUNDING else float(f'{change:.3g}'))})"
        if any(cells):
            rows.append([words, *cells])
    return Table(["", *(run.name for run in runs)], rows) if rows else None


def same_rows(runs: Sequence[PageRun]) -> bool:
    """Returns True if all runs are known to have the same held-out rows."""
    digests = {run.held_out for run in runs}
    return len(digests) == 1 and None not in digests


def _end(curves: RunCurves, name: str, place: int) -> str:
    if name not in curves:
        return ""
    # A single evaluation is that of the start, or else that of the end.
    if name.startswith("eval_") and len(curves[name]) == 1 and (place == 0) != (curves[name].x[0] == 0):
        return ""
    value = float(curves[name].y[place])
    # What rounding leaves where policy and reference are equal.
    return number_words(0.0 if abs(value) < ROUNDING else value)


def settings_of(runs: Sequence[PageRun]) -> list[Setting]:
    """Returns the keys that differ from their defaults in a run; those that differ between runs come first."""
    defaults: dict[str, Any] = {}
    about: dict[str, str] = {}
    flat = []
    for run in runs:
        # An older version wrote fewer keys: those that are missing were at their defaults.
        own = _flat(defaults_of(CONFIGS[run.command])) if run.command in CONFIGS else {}
        about |= {spec.name: spec.description for spec in key_specs(CONFIGS[run.command])} if own else {}
        config = _flat(run.config)
        flat.append(config | {key: value for key, value in own.items() if config and key not in config})
        defaults |= own
    found = []
    for key in dict.fromkeys(key for values in flat for key in values):
        there = [values[key] for values in flat if key in values]
        differs = key not in OF_THE_PLACE and (len(there) < len(flat) or any(one != there[0] for one in there))
        if differs or key not in defaults or any(one != defaults[key] for one in there):
            default = as_yaml(defaults[key]) if key in defaults else ""
            values = [as_yaml(values[key]) if key in values else "" for values in flat]
            found.append(Setting(key, values, default, differs, about.get(key, "")))
    return sorted(found, key=lambda setting: not setting.differs)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a config with those of its groups next to them, as `mesh.fsdp`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "lora":
            # Of adapters, only what was asked for: most of their keys are null.
            is_on = isinstance(value, Mapping)
            flat["lora"] = True if is_on else None
            inner = value if is_on else {}
            flat |= {f"lora.{name}": one for name, one in inner.items() if one != vars(LoraConfig()).get(name)}
        elif isinstance(value, Mapping) and value:
            flat |= {f"{key}.{inner}": one for inner, one in value.items()}
        elif isinstance(value, list):
            flat[key] = [_given(one) for one in value]
        else:
            flat[key] = value
    return flat


def _given(value: Any) -> Any:
    """Returns a dataset without the keys that are at their defaults; any other entry of a list as it is."""
    if not isinstance(value, Mapping):
        return value
    defaults = vars(DatasetConfig(path="any"))
    return {key: one for key, one in value.items() if key not in defaults or one != defaults[key]}


def time_spent(run: PageRun) -> list[TimeSpent]:
    """Returns the phases of a run with their seconds, the longest first; none if it did not measure them."""
    timing = run.record.get("timing")
    seconds = {
        name: value for name, value in (timing if isinstance(timing, Mapping) else {}).items() if _is_time(value)
    }
    total = sum(seconds.values())
    return [
        TimeSpent(PHASES.get(name, name), f"{seconds_words(value)} ({percent(value / total)})", value / total)
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def seconds_words(seconds: float) -> str:
    """Returns a span of time in seconds or, from two minutes, as hours, minutes and seconds.

    >>> seconds_words(3.21), seconds_words(64.2), seconds_words(3725)
    ('3.2 s', '64 s', '1:02:05')
    """
    if seconds >= 120:
        return clock(seconds)
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def speed(runs: Sequence[PageRun], curves: Sequence[RunCurves]) -> Table | None:
    """Returns rates and memory of runs; rates are medians over the logged steps."""
    rows: list[list[str]] = []

    def add(words: str, cells: Sequence[str]) -> None:
        if any(cells):
            rows.append([words, *cells])

    def medians(name: str, words: str, shown: Any) -> None:
        add(words, [shown(float(np.median(one[name].y))) if name in one else "" for one in curves])

    medians("step_seconds", "time of a step", lambda value: f"{value:.3g} s")
    medians("tokens_per_second", "tokens per second", lambda value: f"{value:,.0f}")
    for unit in ("pairs", "rows"):
        medians(f"{unit}_per_second", f"{unit} per second", number_words)
    medians("mfu", "model FLOP utilization", percent)
    medians("mfu_executed", "the same with padding and recomputation", percent)
    medians("padding", "padding", percent)
    add(
        "peak memory of a device",
        [memory(one["peak_memory_gib"].y.max() * 2**30) if "peak_memory_gib" in one else "" for one in curves],
    )
    add("tokens in all", [f"{one['num_tokens'].y[-1]:,.0f}" if "num_tokens" in one else "" for one in curves])
    late = [run.record.get("late_programs") for run in runs]
    add("programs compiled in the middle of training", [str(one) if one else "" for one in late])
    return Table(["", *(run.name if len(runs) > 1 else "" for run in runs)], rows) if rows else None
